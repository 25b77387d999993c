"""Nothing that a server gives to a flow of one side shows in a flow of the other (L30)."""

import struct
from collections import defaultdict

import pytest

from tests.craft import ACK, SYN
from tests.netns.stage import SERVER, open_stage, start_app

pytestmark = [pytest.mark.netns, pytest.mark.lab(tunnel_kind="veth")]

PORT = 8088
TIMESTAMPS, MPTCP, FAST_OPEN, EXPERIMENT = 8, 30, 34, 254
MPTCP_PROTOCOL = 262
METRICS = {"rtt", "rttvar", "cwnd", "ssthresh", "reordering", "fo_cookie"}
ONE_CLOCK = 1 << 20  # milliseconds; drawn by lot, times are farther apart
SERVE = """
import threading

def serve(kind):
    server = socket.socket(socket.AF_INET6, socket.SOCK_STREAM, kind)
    server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    server.bind(('::', port if kind == socket.IPPROTO_TCP else port + 1))
    if kind == socket.IPPROTO_TCP:
        server.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    server.listen(); server.settimeout(None)
    while True:
        own, _ = server.accept()
        own.settimeout(None); own.sendall(own.recv(100)); own.recv(1); own.close()

for kind in (socket.IPPROTO_TCP, 262):
    threading.Thread(target=serve, args=(kind,), daemon=True).start()
"""
# With Fast Open, or with Multipath TCP: with both a server's accept() may not be woken (Linux 6.18, seen).
SAY = """
def say(to, kind):
    with socket.socket(family(to), socket.SOCK_STREAM, kind) as own:
        own.settimeout(None)
        if kind == socket.IPPROTO_TCP:
            own.sendto(b'hello', socket.MSG_FASTOPEN, (to, port))
        else:
            own.connect((to, port + 1))
            own.sendall(b'hello')
        return read_exactly(own, 5)
"""


def options_of(packet):
    """The options of a SYN: kind and content."""
    at = 20 if packet[0] >> 4 == 4 else 40
    options, rest = {}, packet[at + 20 : at + (packet[at + 12] >> 4) * 4]
    while rest and rest[0]:
        length = 1 if rest[0] == 1 else rest[1]
        options[rest[0]] = rest[2:length]
        rest = rest[length:]
    return options


async def syns(lab, version):
    """By side, the options of every SYN that the host has sent to the server."""
    found = defaultdict(list)
    for side, observer in (("uplink", lab.uplink), ("tunnel", lab.tunnel)):
        await observer.settle()
        for seen in observer.seen("tcp", destination=SERVER[version]):
            packet = seen.frame[14:]
            flags = packet[(20 if version == 4 else 40) + 13]
            if seen.direction == "out" and flags & (SYN | ACK) == SYN:
                found[side].append(options_of(packet))
    return found


def time_of(options):
    return struct.unpack("!I", options[TIMESTAMPS][:4])[0]


@pytest.mark.attack("a server's Fast Open cookie", "shown to it with every next SYN", "asked for on neither side")
@pytest.mark.attack("a join of Multipath TCP", "any address of the host may join", "connections are plain TCP")
@pytest.mark.attack("TCP's clock, of hosts with one", "one time on both sides", "told on one side only")
@pytest.mark.attack("how slow a server was", "remembered by address, for all", "forgotten")
async def test_a_server_does_not_know_again_on_one_side_whom_it_met_on_the_other(lab):
    """L30: by both apps, three times each; the clock is one as on older kernels (tcp_timestamps = 2)."""
    lab.internet.sysctl({"net/ipv4/tcp_fastopen": 0x3, "net/mptcp/enabled": 1})
    lab.host.sysctl({"net/ipv4/tcp_timestamps": 2, "net/ipv4/tcp_fastopen": 1, "net/mptcp/enabled": 1})

    async def speak(app):
        await app(SAY, port=PORT)
        for version in (4, 6):
            for kind in (6, MPTCP_PROTOCOL):
                for _ in range(3):
                    assert b"hello" == await app(f"say(SERVER{version}, kind)", kind=kind)

    async def remembered():
        """What is told of any server."""
        return set((await lab.host.run(["ip", "tcp_metrics", "show"])).stdout.split())

    program = lab.copy_program("python", "app")
    async with start_app(lab.internet, program) as server:
        await server(SERVE, port=PORT)
        async with start_app(lab.host, program) as app:
            await speak(app)
            times = []
            for version in (4, 6):
                sent = (await syns(lab, version))["uplink"]
                cookies = [options[FAST_OPEN] for options in sent if options.get(FAST_OPEN)]
                assert len(cookies) > 1, "the control: the cookie comes again"
                assert 1 == len(set(cookies))
                assert any(MPTCP in options for options in sent)
                times += [time_of(options) for options in sent]
            assert max(times) - min(times) < ONE_CLOCK
            assert {"rtt", "fo_cookie"} <= await remembered()
        await lab.host.run(["ip", "tcp_metrics", "flush"])

        async with open_stage(lab) as stage, stage.app(stage.excluded) as one, stage.app(stage.included) as other:
            stage.clear()
            await speak(one)
            await speak(other)
            for version in (4, 6):
                found = await syns(lab, version)
                assert {"uplink", "tunnel"} == set(found)
                for options in (*found["uplink"], *found["tunnel"]):
                    assert set() == {MPTCP, FAST_OPEN, EXPERIMENT} & set(options)
                assert all(TIMESTAMPS in options for options in found["uplink"])
                assert not any(TIMESTAMPS in options for options in found["tunnel"])
            # It is noted that an answer came, which no app can be told by.
            assert set() == METRICS & await remembered()
