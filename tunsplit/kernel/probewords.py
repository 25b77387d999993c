"""What is put into nftables to see whether this kernel takes it."""

# Each kind of expression that our own table is made of.
RULESET = """
table inet probe {
    counter drops { }
    set ports { type inet_service; elements = { 50000 }; }
    set identifiers { typeof icmp id; }
    chain arrive {
        type filter hook prerouting priority -310; policy accept;
        iifname "a" meta mark 0 meta mark set 0x1
    }
    chain replies {
        type filter hook prerouting priority -199; policy accept;
        iifname "a" ct state != { established, related } udp dport @ports counter name drops drop
        iifname "a" icmp type echo-reply icmp id @identifiers drop
    }
    chain may_leave {
        ip hdrlength > 5 return
        exthdr rt exists return
        oifname "a" meta skuid != { 0 } return
        oifname "a" meta l4proto { tcp, udp } th dport { 53, 853 } fib saddr . oif type local accept
    }
    chain steer {
        type route hook output priority mangle; policy accept;
        jump may_leave
        meta mark set 0x1
    }
    chain unwritten {
        type filter hook postrouting priority srcnat + 10; policy accept;
        oifname "a" ct status snat drop
    }
    chain fitted {
        type filter hook forward priority mangle; policy accept;
        iifname "a" tcp flags syn tcp option maxseg size set rt mtu
    }
    chain outgoing {
        type filter hook output priority filter; policy accept;
        meta l4proto tcp reject with tcp reset
        reject
    }
    chain incoming {
        type filter hook input priority filter; policy drop;
        icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 accept
    }
    chain forwarded {
        type filter hook forward priority filter; policy drop;
        iifname "a" oifname "a" accept
    }
}
table arp probe {
    chain arrive {
        type filter hook input priority -310; policy accept;
        iifname != { "a" } arp daddr ip { 192.0.2.1 } drop
    }
}
"""


# And of the netdev table.
EGRESS = """
table netdev probe {
    chain leaving {
        type filter hook egress devices = { "probe" } priority filter; policy accept;
        meta priority 7500:0 meta skuid 0 accept
        meta rtclassid >= 0 accept
        ether type { 0x0806, 0x888e } accept
        icmpv6 type nd-neighbor-solicit ip6 hoplimit 255 accept
        drop
    }
}
"""
