"""The launch race (L7): no packet goes anywhere before its app is known, and none that waited is lost."""

import pytest

from tests.netns.stage import SERVER, until

pytestmark = pytest.mark.netns

MANY = 20
# The first thing that a new process does. Of forty ports which the kernel chooses, two are at times the same.
SEND = """
import socket, sys
own = socket.socket(socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET, socket.SOCK_DGRAM)
own.bind(('', int(sys.argv[3])))
own.sendto(sys.argv[2].encode(), (sys.argv[1], 7))
"""
# The same, with an answer to wait for.
ASK = """
import socket, sys
own = socket.create_connection((sys.argv[1], 7))
own.sendall(sys.argv[2].encode())
own.recv(100)
"""


@pytest.mark.parametrize("version", [4, 6])
async def test_new_processes_that_send_and_end_at_once_are_never_on_the_wrong_side(stage, version):
    """L7: twenty of a new executable on each side, all at once. One that has ended before it is found has no owner."""
    client = stage.lab.directory / "send.py"
    client.write_text(SEND)
    script = stage.lab.directory / "all-at-once"
    script.write_text(
        "".join(
            f"{program} -I -S {client} {SERVER[version]} 'i am {program.name} {number:02}' {first_port + number} &\n"
            for number in range(MANY)
            for program, first_port in ((stage.excluded, 20000), (stage.included, 21000))
        )
        + "wait\n"
    )
    await stage.lab.host.run(["sh", script])

    async def all_are_judged():
        status = (await stage.daemon.status())["counters"]
        judged = sum(count for name, count in status.items() if name.startswith("attributed_"))
        return judged >= 2 * MANY

    await until(all_are_judged, "every datagram has been judged")
    assert await stage.where(payload=b"i am excluded") <= {"uplink"}
    assert await stage.where(payload=b"i am included") <= {"tunnel"}


@pytest.mark.parametrize("version", [4, 6])
async def test_every_new_process_that_waits_for_its_answer_gets_it(stage, version):
    """L7: the same with processes that live long enough to be found: nothing is refused or lost."""
    script = stage.lab.directory / "all-at-once"
    client = stage.lab.directory / "ask.py"
    client.write_text(ASK)
    script.write_text(
        "".join(
            f"{program} -I -S {client} {SERVER[version]} 'i am {program.name} {number:02}' &\n"
            for number in range(MANY)
            for program in (stage.excluded, stage.included)
        )
        + "wait\n"
    )
    done = await stage.lab.host.run(["sh", script])
    assert "" == done.stderr

    for program, side in ((stage.excluded, "uplink"), (stage.included, "tunnel")):
        assert {side} == await stage.where(payload=f"i am {program.name}".encode())
        frames = getattr(stage.lab, side).seen("tcp", destination=SERVER[version], payload=b"i am")
        assert {f"i am {program.name} {number:02}".encode() for number in range(MANY)} == {
            frame.payload for frame in frames
        }


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize(("program", "side"), [("excluded", "uplink"), ("included", "tunnel")])
async def test_a_burst_in_the_first_millisecond_arrives_complete_and_in_order(stage, program, side, version):
    """L7: what is held is released in order, and before what comes later."""
    async with stage.app(getattr(stage, program)) as app:
        await app(f"own = udp(SERVER{version})\nfor number in range(50): own.send(b'datagram %02d' % number)")
        answers = await app("[own.recv(2048).split(b'\\n')[1] for _ in range(50)]")

    expected = [b"datagram %02d" % number for number in range(50)]
    assert expected == answers
    assert {side} == await stage.where(payload=b"datagram")
    frames = getattr(stage.lab, side).seen("udp", destination=SERVER[version])
    assert expected == [frame.payload for frame in frames]
