"""What the kernel tells of processes, sockets and the network, and what anybody can make it tell."""

import contextlib
import struct
from ipaddress import AddressValueError, NetmaskValueError, ip_address, ip_interface, ip_network

from tests.fuzz.target import Target, target
from tunsplit.errors import KernelError
from tunsplit.host import Action, Route, Rule
from tunsplit.kernel import netlink, procevents, procpid
from tunsplit.kernel import rtmessages as rt
from tunsplit.kernel.procnet import parse_table
from tunsplit.kernel.rtnetlink import Change, events_untrusted, neighbours_untrusted
from tunsplit.kernel.sockdeaths import parse_death
from tunsplit.kernel.sysctlrecords import parse as parse_records
from tunsplit.names import ROUTE_PROTOCOL

TARGETS: dict[str, Target] = {}


def process_events() -> list[bytes]:
    head = struct.pack("=IHHII", procevents.SIZE, netlink.NLMSG_DONE, 0, 0, 0)
    connector = struct.pack("=IIIIHH", procevents.CN_IDX_PROC, procevents.CN_VAL_PROC, 1, 0, 40, 0)
    kinds = (procevents.FORK, procevents.EXEC, procevents.UID, procevents.EXIT)
    return [head + connector + struct.pack("=IIQiiii8x", kind, 0, 1 << 40, 10, 10, 11, 12) for kind in kinds]


@target(TARGETS, process_events)
def a_process_event(data: bytes) -> None:
    """It is an event, or nothing; what lies in the buffer after it does not count."""
    found = procevents.parse_untrusted(data, len(data), 0)
    assert found == procevents.parse_untrusted(data + bytes(procevents.SIZE), len(data), 0)


def rtnetlink_messages() -> list[bytes]:
    rule = Rule(4, 81, iif="lo", to=ip_network("10.0.0.0/8"), ipproto=17, dport=(53, 53), fwmark=1, uidrange=(0, 9))
    route = Route(ip_network("10.0.0.0/8"), 7501, oif=2, gateway=ip_address("10.0.0.1"), mtu=1300)
    route6 = Route(ip_network("2001:db8::/32"), 7501, oif=2, gateway=ip_address("fe80::1"), protocol=ROUTE_PROTOCOL)
    hops = b"".join(
        rt.RTNEXTHOP.pack(16, 0, 0, 2) + netlink.attribute(rt.RTA_GATEWAY, ip_address(f"10.0.0.{number}").packed)
        for number in (1, 2)
    )
    link = rt.IFINFOMSG.pack(0, rt.ARPHRD_ETHER, 2, rt.IFF_UP, 0)
    link += netlink.attribute(rt.IFLA_IFNAME, b"eth0\0") + netlink.attribute(rt.IFLA_MTU, rt.U32.pack(1500))
    link += netlink.nested(rt.IFLA_LINKINFO, netlink.attribute(rt.IFLA_INFO_KIND, b"veth\0"))
    neighbour = rt.encode_neighbour(2, ip_address("10.0.0.1")) + netlink.attribute(rt.NDA_LLADDR, bytes(6))
    multipath = rt.encode_route(route) + netlink.attribute(rt.RTA_MULTIPATH, hops)
    bodies = [
        (rt.RTM_NEWLINK, link),
        (rt.RTM_DELLINK, link),
        (rt.RTM_DELADDR, rt.encode_address(2, ip_interface("10.0.0.2/24"))),
        (rt.RTM_NEWADDR, rt.encode_address(2, ip_interface("2001:db8::2/64"))),
        (rt.RTM_NEWROUTE, rt.encode_route(route)),
        (rt.RTM_DELROUTE, rt.encode_route(route6)),
        (rt.RTM_NEWROUTE, multipath),
        (rt.RTM_NEWRULE, rt.encode_rule(rule)),
        (rt.RTM_DELRULE, rt.encode_rule(Rule(6, 84, action=Action.UNREACHABLE))),
        (rt.RTM_NEWNEIGH, neighbour),
        (rt.RTM_DELNEIGH, neighbour),
    ]
    messages = [netlink.message(kind, 0, number, body) for number, (kind, body) in enumerate(bodies)]
    return [*messages, b"".join(messages)]


@target(TARGETS, rtnetlink_messages)
def an_rtnetlink_event(data: bytes) -> None:
    """It is understood, or anything may have changed."""
    for event in events_untrusted(data):
        assert event.loss is None or event.change in (Change.LINK, Change.ADDRESS)


@target(TARGETS, rtnetlink_messages)
def a_neighbour_event(data: bytes) -> None:
    """It is understood, or some were lost."""
    with contextlib.suppress(ValueError, IndexError, struct.error):
        for neighbour in neighbours_untrusted(data):
            assert neighbour.address.version in (4, 6)


DECODERS = {
    rt.RTM_NEWLINK: rt.decode_link,
    rt.RTM_NEWADDR: rt.decode_address,
    rt.RTM_NEWROUTE: lambda body: list(rt.decode_routes(body)),
    rt.RTM_GETROUTE: rt.decode_next_hop,
    rt.RTM_NEWRULE: rt.decode_rule,
    rt.RTM_NEWNEIGH: rt.decode_neighbour,
}
# Objects that are cut, or without what every one of them has: the kernel writes none.
NOT_WHOLE = (struct.error, KeyError, IndexError, AddressValueError, NetmaskValueError)


@target(TARGETS, rtnetlink_messages)
def an_rtnetlink_object(data: bytes) -> None:
    """Whatever number the kernel may keep for somebody in an object that is whole is no reason to fail."""
    for kind, _, _, _, body in netlink.iterate_messages(data):
        with contextlib.suppress(*NOT_WHOLE):
            DECODERS.get(kind, lambda _: None)(body)


def deaths() -> list[bytes]:
    body = bytes(60) + netlink.attribute(2, b"info") + netlink.attribute(10, b"\x11")
    return [netlink.message(20, 0, 0, bytes(12) + body)]


@target(TARGETS, deaths)
def a_socket_s_death(data: bytes) -> None:
    """A port, a cookie, a protocol; or nothing."""
    found = parse_death(data, len(data))
    assert found is None or (2, 8) == (len(found.port), len(found.cookie))


STAT = b"4711 (a ) 5 (b) S 1 4711 4711 0 -1 4194304 1 0 0 0 0 0 0 0 20 0 1 0 9999 1000 1 18446744073709551615"
RAW = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer\n"
    "    1: 0100007F:0001 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 12345 2 0 0\n"
)
MOUNTS = (
    b"30 25 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    b"31 25 0:28 / /home/\xff\\040x rw - fuse.x y rw\n"
    b"32 25 0:29 / /mnt rw,nosuid shared:9 - cgroup2 none rw\n"
)


@target(TARGETS, lambda: [STAT, RAW.encode(), MOUNTS, b"0::/user.slice\n1:name=systemd:/x\n", b"python\0-c\0\xff\0"])
def a_file_of_proc(data: bytes) -> None:
    """Names that anybody may choose, and tables: read, or refused in one way."""
    with contextlib.suppress(ValueError):
        procpid.parse_stat(data)
    assert procpid.parse_cmdline(data) is not None
    procpid.parse_cgroup(data)
    with contextlib.suppress(KernelError):
        parse_table(data.decode(errors="surrogateescape"))


LISTING = """table inet tunsplit {
    comment "x"
    set before { type inet_proto; elements = { 1 comment "sysctl net/ipv4/conf/eth0/rp_filter 1 2" } }
    set ranges { type inet_proto; elements = { 2 comment "ports net/ipv4/ip_local_reserved_ports 40000-40100" } }
}
"""


@target(TARGETS, lambda: [LISTING.encode()])
def a_listing_of_nft(data: bytes) -> None:
    """Comments of others are no records of ours."""
    for path, comment in parse_records(data.decode(errors="replace")).items():
        assert path.partition("+")[0] in comment
