"""Paths that are narrower than they look (L22), and what one side learns of them is not the other's affair (L30)."""

import socket
from contextlib import suppress

import pytest

from tests.craft import fragments, udp
from tests.netns.stage import HOST, HOST_TUNNEL, SERVER, TUN, open_stage, start_app, until
from tunsplit.lab import addresses
from tunsplit.lab.addresses import format_host
from tunsplit.wire.ip import set_header_checksum

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
SIDES = pytest.mark.parametrize(("name", "side"), [("excluded", "uplink"), ("included", "tunnel")])
OTHER = {"excluded": ("included", "tunnel"), "included": ("excluded", "uplink")}
MTU = 1300
HEADERS = {4: 28, 6: 48}  # of IP and UDP
TUN4 = "10.128.0.1"
PATH_MTU = {4: (socket.IPPROTO_IP, 14), 6: (socket.IPPROTO_IPV6, 24)}  # IP(V6)_MTU
TUN_MTU = addresses.TUNNEL_MTU

TRANSFER = """
import threading

def transfer(address, size=1_000_000):
    with tcp(address) as own:
        own.settimeout(15)  # what was lost when a path became narrow is sent again later and later
        read_line(own)
        data = os.urandom(size)
        thread = threading.Thread(target=own.sendall, args=(data,))
        thread.start()
        back = read_exactly(own, size)
        thread.join()
        return back == data, own.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)

def datagram(address, version, discover=None):
    own = udp(address)
    if discover is not None:
        own.setsockopt(*((socket.IPPROTO_IP, 10) if version == 4 else (socket.IPPROTO_IPV6, 23)), discover)
    return own

def send(own, size):
    try:
        own.send(bytes(size))
        return size
    except OSError as error:
        return errno.errorcode[error.errno]

def answered(own, size, tries=20):
    own.settimeout(0.2)
    for _ in range(tries):
        with contextlib.suppress(OSError):
            own.send(bytes(size))
            return len(own.recv(65536)) > size
    return False

def path_mtu(own, version):
    return own.getsockopt(*((socket.IPPROTO_IP, 14) if version == 4 else (socket.IPPROTO_IPV6, 24)))
"""


async def make_narrow(lab, side, mtu=MTU):
    """Make the way of one side narrow, both ways, beyond its first router: none of this host's devices shows it."""
    for version in (4, 6):
        if side == "uplink":
            # The tunnel's own packets pass here too, and keep their width.
            for source in (HOST[version], SERVER[version]):
                await lab.router.run(["ip", f"-{version}", "rule", "add", "from", str(source), "lookup", "100"])
            lab.router.ip(
                f"route add {SERVER[version]} dev inet0 table 100 mtu lock {mtu}\n"
                f"route add {HOST[version]} dev lan0 table 100 mtu lock {mtu}"
            )
        else:
            lab.relay.ip(
                f"route add {SERVER[version]} via {addresses.ROUTER_RELAY[version].ip} mtu lock {mtu}\n"
                f"route add {HOST_TUNNEL[version]} dev wg0 mtu lock {mtu}"
            )


def too_big(stage, side, version):
    """The errors that came in on this side about packets to the server."""
    kind = {4: 3, 6: 2}[version]
    frames = getattr(stage.lab, side).seen({4: "icmp", 6: "icmpv6"}[version])
    return [frame for frame in frames if frame.kind == kind and frame.direction == "in" and frame.quoted is not None]


def sent(stage, side, version, protocol="udp"):
    """The packets that left for the server on this side: their lengths, and whether they are in pieces."""
    frames = getattr(stage.lab, side).seen(protocol, destination=SERVER[version])
    header = 14 if side == "uplink" else 0
    return [(frame.octets - header, frame.fragment) for frame in frames if frame.direction == "out"]


@SIDES
@BOTH
async def test_tcp_fits_a_narrow_path_and_the_other_side_does_not_hear_of_it(stage, name, side, version):
    """L22, L30: megabytes both ways; then the other side's app, to the same server, with all that its path takes."""
    other, other_side = OTHER[name]
    await make_narrow(stage.lab, side)
    async with stage.app(getattr(stage, name)) as app, stage.app(getattr(stage, other)) as stranger:
        await app(TRANSFER)
        await stranger(TRANSFER)
        for _ in range(2):
            assert (await app(f"transfer(SERVER{version})"))[0]
        assert {side} == await stage.where(address=SERVER[version])
        assert too_big(stage, side, version)

        stage.clear()
        whole, segment = await stranger(f"transfer(SERVER{version}, 300_000)")
        assert whole
        assert TUN_MTU - HEADERS[version] - 24 == segment  # TCP's header and timestamps, instead of UDP's
        assert {other_side} == await stage.where(address=SERVER[version])
        assert [] == too_big(stage, other_side, version)


@SIDES
@BOTH
async def test_datagrams_meet_a_narrow_path_as_on_any_linux_host(stage, name, side, version):
    """L22, L30: refused on the spot where they may not be cut, cut where they may; the other side's are whole."""
    other, other_side = OTHER[name]
    await make_narrow(stage.lab, side)
    largest = MTU - HEADERS[version]
    async with stage.app(getattr(stage, name)) as app, stage.app(getattr(stage, other)) as stranger:
        await app(TRANSFER)
        await stranger(TRANSFER)
        await app(f"strict = datagram(SERVER{version}, {version}, 2); send(strict, 1340)")

        async def is_told():
            return "EMSGSIZE" == await app("send(strict, 1340)")

        await until(is_told, "the socket knows")
        assert "EMSGSIZE" == await app("send(strict, 1340)")
        assert MTU == await app(f"path_mtu(strict, {version})")
        assert await app(f"answered(strict, {largest})")

        await app(f"lax = datagram(SERVER{version}, {version})")
        for size in (1340, 4000, 9000):
            assert await app(f"answered(lax, {size})")
        assert {side} == await stage.where(address=SERVER[version])

        stage.clear()
        await stranger(f"strict = datagram(SERVER{version}, {version}, 2)")
        assert await stranger("answered(strict, 1340)")
        assert TUN_MTU == await stranger(f"path_mtu(strict, {version})")
        assert [(1340 + HEADERS[version], False)] == sent(stage, other_side, version)
        assert {other_side} == await stage.where(address=SERVER[version])


@BOTH
async def test_what_a_server_learns_of_a_client_s_path_is_not_the_other_side_s_affair(
    stage, excluded, included, version
):
    """L20, L22, L30: the errors about its answers come to the kernel itself."""
    await make_narrow(stage.lab, "uplink")
    async with start_app(stage.lab.internet, stage.included) as client:
        family, every = {4: ("AF_INET", ""), 6: ("AF_INET6", "::")}[version]
        await excluded(f"server = socket.create_server((every, 8080), family=socket.{family})", every=every)
        await client("own = tcp(host, 8080)", host=str(HOST[version]))
        await excluded(
            "import threading\naccepted, _ = server.accept()\n"
            "thread = threading.Thread(target=accepted.sendall, args=(bytes(1_000_000),)); thread.start()"
        )
        assert 1_000_000 == await client("len(read_exactly(own, 1_000_000))")
        await excluded("thread.join()")
        assert MTU == await excluded(f"accepted.getsockopt(*{PATH_MTU[version]})")
        assert {"uplink"} == await stage.where(address=SERVER[version])
        assert too_big(stage, "uplink", version)

        # One that is bound to every address answers from the one that was asked.
        await excluded(
            f"asked = socket.socket(socket.{family}, socket.SOCK_DGRAM)\n"
            "asked.bind((every, 9000)); asked.settimeout(3)\n"
            "def serve():\n    _, peer = asked.recvfrom(100); asked.sendto(bytes(1340), peer)"
        )
        await client("asking = udp(host, 9000); asking.settimeout(0.3)")

        async def is_answered():
            await client("asking.send(b'?')")
            with suppress(OSError):
                await excluded("serve()")
                return await client("len(asking.recv(2048))")

        assert 1340 == await until(is_answered, "a datagram fits")

        await included(TRANSFER)
        await included(f"strict = datagram(SERVER{version}, {version}, 2)")
        assert await included("answered(strict, 1340)")
        assert (True, TUN_MTU - HEADERS[version] - 24) == await included(f"transfer(SERVER{version}, 100_000)")


@SIDES
async def test_super_packets_of_datagrams_and_pings_meet_it_too(stage, name, side):
    """L22: UDP_SEGMENT, as QUIC sends, is refused where its datagrams do not fit; an echo is cut."""
    await make_narrow(stage.lab, side)
    async with stage.app(getattr(stage, name)) as app:
        await app(TRANSFER)
        for version in (4, 6):
            await app(f"own = datagram(SERVER{version}, {version}, 2); own.setsockopt(socket.SOL_UDP, 103, 1340)")
            await app("send(own, 10 * 1340)")

            async def is_told():
                return await app("send(own, 10 * 1340)") in ("EMSGSIZE", "EINVAL")

            await until(is_told, "the socket knows")
            assert await app("send(own, 10 * 1340)") in ("EMSGSIZE", "EINVAL")
            await app("own.setsockopt(socket.SOL_UDP, 103, 1200); own.settimeout(3); own.send(bytes(10 * 1200))")
            assert 10 == await app("sum(len(own.recv(2048)) > 1200 for _ in range(10))")
            await app(f"pinging = ping(SERVER{version}); pinging.settimeout(0.2)")

            async def is_answered():
                try:
                    return await app("len(echo(pinging, bytes(1340)))")
                except OSError:
                    return 0

            assert 1340 == await until(is_answered, "an echo comes back")
            assert {side} == await stage.where(address=SERVER[version])


@SIDES
async def test_a_device_s_mtu_changes_while_flows_run(stage, name, side):
    """L22: smaller, and back; what runs goes on, and nothing needs the old size."""
    device, far, mtu = {"uplink": ("eth0", (stage.lab.router, "lan0"), 1500), "tunnel": ("wg0", None, TUN_MTU)}[side]
    async with stage.app(getattr(stage, name)) as app:
        await app(TRANSFER)
        await app(
            "results = []\n"
            "def work(address):\n    results.append(transfer(address, 3_000_000)[0])\n"
            "threads = [threading.Thread(target=work, args=(one,)) for one in (SERVER4, SERVER6)]\n"
            "for one in threads: one.start()"
        )
        for size in (1300, mtu, 1290, mtu, 1400):
            for namespace, name in ((stage.lab.host, device), far or (stage.lab.relay, "wg0")):
                namespace.ip(f"link set {name} mtu {size}")

            async def has_followed(size=size):
                shown = (await stage.lab.host.run(["ip", "link", "show", TUN])).stdout
                return f" mtu {min(size, TUN_MTU)} " in shown

            await until(has_followed, "the tun has its size")
            for version in (4, 6):
                assert await app(f"answered(datagram(SERVER{version}, {version}), 1390)")
        await app("for one in threads: one.join()")
        assert [True, True] == await app("results")
        assert {side} == await stage.where(address=SERVER[4]) | await stage.where(address=SERVER[6])


@SIDES
@BOTH
async def test_a_tun_wider_than_its_sides_makes_no_difference(lab, name, side, version):
    """L22: what leaves fits the side all the same, and what a SYN promises to take does."""
    mtu = {"uplink": 1500, "tunnel": TUN_MTU}[side]
    async with open_stage(lab, tun={"mtu": 9000}) as stage, stage.app(getattr(stage, name)) as app:
        await app(TRANSFER)
        assert (await app(f"transfer(SERVER{version})"))[0]
        for frame in getattr(lab, side).seen("tcp", address=SERVER[version]):
            header = frame.frame[14:] if side == "uplink" else frame.frame
            at = {4: 20, 6: 40}[version]
            if frame.direction == "out" and header[at + 13] & 2:
                assert int.from_bytes(header[at + 22 : at + 24], "big") <= mtu - at - 20, str(frame)

        await app(f"strict = datagram(SERVER{version}, {version}, 2)")

        async def is_told():
            return "EMSGSIZE" == await app("send(strict, 8000)")

        await until(is_told, "the socket knows")
        assert mtu == await app(f"path_mtu(strict, {version})")
        assert await app(f"answered(strict, {mtu - HEADERS[version] - 40})")
        for size in (mtu, 4000, 9000):
            assert await app(f"answered(datagram(SERVER{version}, {version}), {size})")
        assert {side} == await stage.where(address=SERVER[version])


def overlapping(pieces):
    """The same fragments, of which the last comes eight octets too early."""
    *others, last = pieces
    at = 42 if last[0] >> 4 == 6 else 6
    early = bytearray(last)
    early[at : at + 2] = (int.from_bytes(last[at : at + 2], "big") - (8 if at == 42 else 1)).to_bytes(2, "big")
    if at == 6:
        set_header_checksum(early)
    return [*others, bytes(early)]


@SIDES
@BOTH
async def test_fragments_come_in_as_they_like(stage, name, side, version):
    """L22: backwards; without a first; overlapping, which nobody believes (RFC 5722); and whole again."""
    source, own = SERVER[version], {"uplink": HOST, "tunnel": HOST_TUNNEL}[side][version]
    host, device = {"uplink": (stage.lab.router, "lan0"), "tunnel": (stage.lab.relay, "wg0")}[side]
    ethertype = {4: b"\x08\x00", 6: b"\x86\xdd"}[version]
    link = await stage.mac() + b"\2\0\0\0\0\1" + ethertype if side == "uplink" else b""
    async with stage.app(getattr(stage, name)) as app:
        await app(f"own = udp(SERVER{version}); own.send(b'?'); own.recv(100)")
        nat = (await stage.flow_of(app))["nat"].rpartition(":")[2]
        with host.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((device, int.from_bytes(ethertype, "big")))

            async def receives(pieces):
                for piece in pieces:
                    wire.send(link + piece)
                return await app("received(own)")

            await app(
                "own.settimeout(0.5)\ndef received(own):\n"
                "    with contextlib.suppress(TimeoutError): return own.recv(65536)[:1]"
            )

            def pieces(number):
                ends = f"{format_host(source)}:7 > {format_host(own)}:{nat}"
                return fragments(udp(ends, bytes([number]) * 3000), 1200, identification=number)

            assert b"A" == await receives(reversed(pieces(65)))
            assert await receives(pieces(66)[1:]) is None
            assert await receives(overlapping(pieces(67))) is None
            assert b"D" == await receives(pieces(68))
        assert {side} == await stage.where(address=SERVER[version])


@SIDES
async def test_fragments_leave_as_they_like_but_never_without_a_first(stage, name, side):
    """L22, L7: what comes before its first waits for it; a raw socket sends in any order."""
    async with stage.app(getattr(stage, name)) as app:
        await app("own = udp(SERVER4); raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)")
        port = await app("own.getsockname()[1]")
        lost, sent = (
            fragments(udp(f"{TUN4}:{port} > {SERVER[4]}:7", bytes([number]) * 3000), 1200, identification=number)
            for number in (65, 66)
        )
        for piece in (*lost[1:], *reversed(sent)):
            await app("raw.sendto(bytes.fromhex(piece), (SERVER4, 0))", piece=piece.hex())

        assert b"B" == await app("own.recv(65536)[-1:]")
        seen = [frame for frame in getattr(stage.lab, side).seen(destination=SERVER[4]) if frame.direction == "out"]
        assert 3 == len(seen)
        assert {side} == await stage.where(destination=SERVER[4])
