"""Programs that are gone before they can be found (L4, L7, L29), and storms of forks."""

import contextlib

import pytest

from tests.netns.sides import is_on
from tests.netns.stage import HOST, SERVER, open_stage, until

pytestmark = pytest.mark.netns

# One datagram, by IPv4 and IPv6 in turn, and the end.
SEND = """
import os, socket, sys
server = sys.argv[1 + int(sys.argv[3]) % 2]
own = socket.socket(socket.AF_INET6 if ':' in server else socket.AF_INET, socket.SOCK_DGRAM)
own.sendto(f'i am {sys.argv[4]} {sys.argv[3]}.'.encode(), (server, 7))
os._exit(0)
"""
PYTHON = "{program} -I -S {script} {four} {six} $number {name}"
# A builtin of bash: the socket is closed in the microsecond in which it has sent, and the program is gone in the next.
BASH = (
    "{program} -c 'server={four}; test $1 = 1 && server={six}; echo i am {name} $0. > /dev/udp/$server/7' "
    "$number $((number % 2))"
)

FORKS = "for n in {1..20}; do for m in {1..50}; do (:) & done; wait; done"


@pytest.mark.parametrize(
    ("kind", "command", "many"), [("python", PYTHON, 100), ("bash", BASH, 250)], ids=["python", "bash"]
)
async def test_a_program_that_sends_once_and_ends_is_never_on_the_wrong_side(
    lab, kind, command, many, record_testsuite_property
):
    """L7: so many of each side, both sides' at once; the share that arrived is reported."""
    programs = {name: lab.copy_program(kind, f"{name}-one") for name in ("excluded", "included")}
    script = lab.directory / "send.py"
    script.write_text(SEND)
    loops = [
        f"for number in {{100..{99 + many}}}; do "
        + command.format(program=program, name=name, script=script, four=SERVER[4], six=SERVER[6])
        + "; done"
        for name, program in programs.items()
    ]
    async with open_stage(lab, [programs["excluded"]]) as stage:
        assert "" == (await lab.host.run(["bash", "-c", f"{loops[0]} & {loops[1]}; wait"])).stderr

        async def nothing_is_held():
            return (await stage.daemon.status())["counters"]["held_flows"] == 0

        async with stage.app(stage.lab.copy_program("python", "last")) as last:

            async def is_served():
                with contextlib.suppress(OSError):  # it may wait behind all the others for too long
                    return await last("ask('udp', SERVER4)")

            await until(is_served, "what came into the tun before has been read")
            await until(nothing_is_held, "all that was read has been judged")
            assert await is_on(stage, last, "tunnel", clear=False)  # an observer sees what there is to see
        assert await stage.where(payload=b"i am excluded") <= {"uplink"}
        assert await stage.where(payload=b"i am included") <= {"tunnel"}

    for name, observer in (("excluded", lab.uplink), ("included", lab.tunnel)):
        frames = [frame for frame in observer.seen("udp", payload=f"i am {name}".encode()) if frame.direction == "out"]
        record_testsuite_property(f"{kind}_arrived_of_{many}_{name}", len(frames))


async def test_flows_go_on_in_a_storm_of_forks(stage, excluded, included):
    """L29: not a packet of them is lost; a child of the storm, and who comes after it, are where they belong."""
    storm = stage.lab.copy_program("bash", "storm")
    for app in (excluded, included):
        await app("own = udp(SERVER4); stream = tcp(SERVER6); line = read_line(stream)")
        await app("own.settimeout(15); stream.settimeout(15)")  # the storm takes the server's time as well
    async with stage.lab.host.start([storm, "-c", f"while :; do {FORKS}; echo forked; done"]) as running:
        await running.wait_written("forked")
        for number in range(100):
            for app, name in ((excluded, "excluded"), (included, "included")):
                told = f"{name} {number:03}"
                await app("own.send(told.encode()); stream.send(told.encode())", told=told)
        for app, name in ((excluded, "excluded"), (included, "included")):
            expected = [f"{name} {number:03}".encode() for number in range(100)]
            assert expected == await app("[own.recv(2048).split(b'\\n')[1] for _ in range(100)]")
            assert b"".join(expected) == await app("read_exactly(stream, 1200)")
    assert {"uplink"} == await stage.where(payload=b"excluded 0")
    assert {"tunnel"} == await stage.where(payload=b"included 0")

    assert await is_on(stage, excluded, "uplink")
    assert await is_on(stage, included, "tunnel")


async def test_the_orphans_of_a_storm_are_where_they_were_born(lab):
    """L6, L29: three thousand forks while an excluded shell leaves children behind; none of those is a stranger."""
    storm, parent = (lab.copy_program("bash", name) for name in ("storm", "parent"))
    curl = lab.copy_program("curl", "curl-of-a-shell")
    async with open_stage(lab, [parent]) as stage:
        asks = "; ".join(f"{curl} -sS --max-time 10 {lab.url(version)}" for version in (4, 6))
        orphan = f"(while test -e /proc/$$; do :; done; {asks}) &"
        forks = "for n in {1..60}; do for m in {1..50}; do (:) & done; wait; done; wait"
        async with stage.lab.host.start([storm, "-c", forks]) as running:
            done = await lab.host.run([parent, "-c", f"{orphan} exit"])
            await running.process.wait()
        assert {str(HOST[4]), str(HOST[6])} == set(done.stdout.split())
        for version in (4, 6):
            assert {"uplink"} == await stage.where(protocol="tcp", destination=SERVER[version])
