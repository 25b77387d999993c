"""NAT's ports where they are few (L35): what others have is left alone, and what was used is used again."""

import pytest

from tests.craft import RST
from tests.netns.stage import HOST, SERVER, start_app

pytestmark = pytest.mark.netns

BOTH = pytest.mark.parametrize("version", [4, 6])
FIRST, LAST = 49152, 65535
LEFT = range(60_000, 60_064)
PORT = 9000
CONNECTIONS, SOME = 240, 10

HOLD = """
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (20_000, 20_000))
held = []
for port in set(range(first, last + 1)) - set(left):
    own = socket.socket(FAMILY[version], socket.SOCK_STREAM)
    own.bind((LOOPBACK[version], port))
    held.append(own)
"""
# The server closes first, so it is he who remembers the connection.
SERVE = """
import threading
listener = socket.create_server((server, port), family=FAMILY[version], backlog=100)
def serve():
    while True:
        listener.accept()[0].close()
threading.Thread(target=serve, daemon=True).start()
"""
NAMES = """
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}
"""
CONNECT = """
def connects():
    with contextlib.suppress(OSError), socket.create_connection((server, port), 10) as own:
        return own.recv(1) == b""
    return False
"""


def flags_of(frame, version):
    return frame[14 + {4: 20, 6: 40}[version] + 13]


@BOTH
async def test_few_ports_are_used_again_in_an_order_that_no_server_mistakes(stage, version):
    """A server that remembers the last connection of a port answers one of two new ones as if it were of the old."""
    where = {"server": str(SERVER[version]), "port": PORT, "version": version}
    async with (
        start_app(stage.lab.internet, stage.included) as server,
        stage.app(stage.included) as holder,
        stage.app(stage.excluded) as app,
    ):
        await server(NAMES + SERVE, **where)
        await holder(NAMES + HOLD, first=FIRST, last=LAST, left=list(LEFT), version=version)
        await app(CONNECT, **where)
        # Each question finds out about some ports that others have.
        await app(f"tries = 1\nwhile sum(connects() for _ in range({SOME})) < {SOME}: tries += 1")
        assert 1 < await app("tries")
        stage.clear()
        assert CONNECTIONS == await app(f"sum(connects() for _ in range({CONNECTIONS}))")

        assert {"uplink"} == await stage.where(port=PORT)
        out = [one for one in stage.lab.uplink.seen("tcp", port=PORT) if one.direction == "out"]
        assert {HOST[version]} == {one.source for one in out}
        assert {one.source_port for one in out} <= set(LEFT)
        resets = sum(bool(flags_of(one.frame, version) & RST) for one in out)
        assert resets < CONNECTIONS // 5, "by chance it would be half of them"
