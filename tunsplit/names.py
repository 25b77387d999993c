"""Names and numbers by which everything of ours on a host is recognised.

They are fixed, so that `tunsplit undo` needs no journal: what carries them is ours, in the network
namespace it is found in, and goes with it.
"""

ROUTE_PROTOCOL = 117  # rtnetlink's rtm_protocol and FRA_PROTOCOL of every route and rule of ours
NFT_TABLE = "tunsplit"  # families inet, arp and netdev
NFT_GUARD = "tunsplit_guard"  # family inet; its owner is the daemon

# Routing tables.
TABLE_TUN = 7500  # default into the tun, and under it unreachable
TABLE_UPLINK = 7501  # the uplink's own on-link prefixes, option 121 routes and default
TABLE_TUNNEL = 7502  # the tunnel's default
TABLE_LAN = 7503  # what included apps may reach beside the tunnel
TABLE_FORWARDED = 7504  # what guests send: default into the tun of forwarded packets, and under it unreachable
TABLE_NAMED = 7505  # where a datagram that names a side's device passes for on its way, until it is steered
TABLE_BOUND_UPLINK = 7506  # into the tun, for packets that carry an address of this side already
TABLE_BOUND_TUNNEL = 7507
TABLE_GUESTS = 7510  # the guests' own prefixes
TABLE_NOWHERE = 7511
TABLES = (
    TABLE_TUN, TABLE_UPLINK, TABLE_TUNNEL, TABLE_LAN, TABLE_FORWARDED, TABLE_NAMED, TABLE_BOUND_UPLINK,
    TABLE_BOUND_TUNNEL, TABLE_GUESTS, TABLE_NOWHERE,
)  # fmt: skip
# Into the tun, to destinations whose path is narrow on a side: for single flows, by rules that come and go.
TABLE_NARROW_UPLINK = 7508
TABLE_NARROW_TUNNEL = 7509

# Packet marks.
MARK_UPLINK = 0x7501  # our own sockets on the uplink; packets that came in there
MARK_TUNNEL = 0x7502
MARK_STEER = 0x7503  # packets that named a side's device without being bound to it: into the tun

# SO_PRIORITY of our packet sockets. Read as a class of traffic it is that of nobody's queueing discipline (7500:), and
# its lower bits, of which the kernel makes a band or a Wi-Fi category, are those of ordinary packets.
FRAME_PRIORITY = 0x7500_0000

# Priorities of the routing rules: one block, in this order, before everybody else's.
PRIORITY_MARKED = 72
PRIORITY_STEERED = 73
PRIORITY_TRANSPORT = 74
PRIORITY_CLOSED = 75
PRIORITY_DHCP = 76
PRIORITY_DNS = 77
PRIORITY_LAN = 78
PRIORITY_GUESTS = 78
PRIORITY_NARROW = 79
PRIORITY_BOUND = 80
PRIORITY_TUN = 81
PRIORITY_NAMED = 82
PRIORITY_FORWARDED = 83
PRIORITY_UNREACHABLE = 84

# NAT's ports and echo identifiers (the dynamic range of RFC 6335 §6).
NAT_FIRST, NAT_LAST = 49152, 65535
