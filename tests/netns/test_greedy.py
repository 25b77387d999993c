"""One user's sockets, however many, leave another user's flows alone (L29, L35)."""

import pytest
import trio

from tests.netns.stage import HOST

pytestmark = pytest.mark.netns

SOCKETS, ROUNDS, MANY = 10_000, 2, 100
PORTS = 16_384  # of UDP
SHARE = PORTS * 3 // 4
GREEDY, MODEST = 64_711, 64_712  # users that nobody is

OPEN = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (12_000, 12_000))
os.setuid(user)
kept = []
def open_all():
    for _ in range(count):
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kept.append(own)
        with contextlib.suppress(OSError):  # refused: he has too many waiting
            own.connect((SERVER4, 7))
            own.send(b"greedy")
opening = threading.Thread(target=open_all)
opening.start()
"""
# The tun's queue is everybody's: of what comes with thousands of others some may be lost, and is sent again.
GO_ON = """
def talks(own):
    own.settimeout(1)
    for _ in range(20):
        with contextlib.suppress(OSError):  # no answer, or refused, since it had to wait for too long: it asks again
            own.send(b"modest")
            return own.recv(100).endswith(b"modest")
        time.sleep(0.1)
    return False
def connects(server):
    for _ in range(20):
        with contextlib.suppress(OSError), tcp(server) as new:
            return bool(read_line(new))
        time.sleep(0.5)  # likewise
    return False
socket.setdefaulttimeout(15)
for version, server in ((4, SERVER4), (6, SERVER6)):
    connection, datagrams = kept[version]
    connection.sendall(b"modest"); assert read_exactly(connection, 6) == b"modest"
    assert talks(datagrams)
    with udp(server) as new:
        assert talks(new)
    assert connects(server)
"""


async def test_ten_thousand_sockets_of_one_user_leave_another_ones_flows_alone(stage):
    """Both are excluded apps, of the same program: what is open goes on meanwhile, and new flows open."""
    async with stage.app(stage.excluded) as greedy, stage.app(stage.excluded) as modest:
        await modest("import threading; os.setuid(user); kept = {}", user=MODEST)
        await modest(
            "for version, server in ((4, SERVER4), (6, SERVER6)):\n"
            "    kept[version] = tcp(server), udp(server)\n"
            "    read_line(kept[version][0])"
        )
        await greedy("import threading\n" + OPEN, user=GREEDY, count=SOCKETS)
        for _ in range(ROUNDS):
            await modest(GO_ON)
        await greedy("opening.join()")
        assert SOCKETS == await greedy("len(kept)")
        await modest(GO_ON)
        for version in (4, 6):
            assert str(HOST[version]) == await modest(f"ask('tcp', SERVER{version})")
        assert {"uplink"} == await stage.where(payload=b"greedy")
        # The control: his are many.
        assert MANY < (await stage.daemon.status())["counters"]["ports_udp_live"]


# Ports below those that the kernel gives by itself, which are fewer, and everybody's.
OPEN_PATIENTLY = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
os.setuid(user)
kept = []
def open_some(numbers):
    for number in numbers:
        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        kept.append(own)
        own.settimeout(1)
        own.bind(("", 10_000 + number))
        own.connect((SERVER4, 7))
        with contextlib.suppress(OSError):  # refused
            own.send(b"greedy")
            own.recv(100)
opening = [threading.Thread(target=open_some, args=(range(first, count, 8),)) for first in range(8)]
for one in opening: one.start()
"""


async def test_one_user_leaves_a_quarter_of_the_ports_to_the_others(stage):
    """L35: who wants more makes room among his own, or is refused."""
    async with stage.app(stage.excluded) as greedy, stage.app(stage.excluded) as modest:
        await modest("import threading; os.setuid(user); kept = {}", user=MODEST)
        await greedy("import threading\n" + OPEN_PATIENTLY, user=GREEDY, count=SHARE + MANY)
        most = 0
        with trio.fail_after(120):
            while await greedy("any(one.is_alive() for one in opening)"):
                most = max(most, await stage.counter("ports_udp_live"))
                await trio.sleep(0.2)
        most = max(most, await stage.counter("ports_udp_live"))
        assert SHARE - MANY <= most <= SHARE
        for version in (4, 6):
            assert str(HOST[version]) == await modest(f"ask('udp', SERVER{version})")
