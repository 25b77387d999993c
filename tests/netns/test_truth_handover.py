"""L11, L27: what changes hands is judged anew: a port within milliseconds, a connection by inheritance."""

import pytest

from tests.netns.family import RELAY, Child
from tests.netns.stage import AGENT

pytestmark = pytest.mark.netns
ROUNDS = 1000
FAMILIES = {4: "socket.AF_INET", 6: "socket.AF_INET6"}


async def bear_with(parent, program, descriptors):
    await parent(RELAY)
    words = [str(program), "-I", "-S", "-u", str(AGENT)]
    pid = await parent("bear('heir', words, pass_fds=descriptors)", words=words, descriptors=descriptors)
    return Child(parent, "heir", pid)


@pytest.mark.parametrize("version", [4, 6])
async def test_a_connection_that_the_other_side_inherits_ends(stage, included, version):
    """L27: an exec is an event, so not a packet of the heir is seen anywhere."""
    await included(f"own = tcp(SERVER{version}); line = read_line(own); other = tcp(SERVER{version}); read_line(other)")
    heir = await bear_with(included, stage.excluded, [await included("own.fileno()")])
    with pytest.raises(OSError, match=r"abort|reset|Broken|timed out"):
        await heir("own = socket.socket(fileno=number); own.send(b'heir'); own.recv(1); own.send(b'heir')",
                   number=await included("own.fileno()"))  # fmt: skip
    assert set() == await stage.where(payload=b"heir")
    assert b"not inherited" == await included("other.send(b'not inherited') and read_exactly(other, 13)")
    assert {"tunnel"} == await stage.where(payload=b"not inherited")


@pytest.mark.parametrize("version", [4, 6])
async def test_a_port_that_changes_hands_is_asked_for_again(stage, excluded, included, version):
    """L11, L27: a thousand rounds of close, bind and send, each side in turn, to the same server."""
    turn = (
        f"own = socket.socket({FAMILIES[version]}, socket.SOCK_DGRAM)\n"
        "own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)\nown.bind(('', 4000))\n"
        f"own.sendto(b'%s %03d' % (name, number), (SERVER{version}, 7))\n"
        "answer = own.recv(100).split(b'\\n')[1]\nown.close()"
    )  # fmt: skip
    for app, name in ((excluded, "excluded"), (included, "included")):
        await app(f"name = b'{name}'")
    arrived = 0
    for number in range(ROUNDS // 2):
        for app in (excluded, included):
            await app(turn.replace("number)", f"{number})"))
            arrived += f" {number:03}".encode() in await app("answer")
    assert ROUNDS == arrived
    assert {"uplink"} == await stage.where(payload=b"excluded ")
    assert {"tunnel"} == await stage.where(payload=b"included ")
