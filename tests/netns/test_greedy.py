"""One user's sockets, however many, leave another user's flows alone (L29, L35)."""

import pytest

from tests.netns.stage import HOST

pytestmark = pytest.mark.netns

SOCKETS, ROUNDS, MANY = 10_000, 2, 100
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
