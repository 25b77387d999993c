"""Who is excluded because of whom (L4, L5, L6): Mullvad's st5 and st7, orphans, daemons, other programs."""

import pytest

from tests.netns import hammer
from tests.netns.family import agent, bear, bear_daemon
from tests.netns.sides import SEEN_AS, is_on, listed, look
from tests.netns.stage import HOST_TUNNEL, SERVER, Stage, open_stage, until

pytestmark = pytest.mark.netns

MANY = 20
SIDES = pytest.mark.parametrize(("program", "side"), [("excluded", "uplink"), ("included", "tunnel")])


@SIDES
@pytest.mark.parametrize("version", [4, 6])
async def test_twenty_children_in_quick_succession_are_their_parents(stage, program, side, version):
    """L4, st5: of twenty copies whose names nobody has listed, each sends at once; the included parent's control."""
    copies = [stage.lab.copy_program("python", f"{7919 * number:x}") for number in range(1, MANY + 1)]
    told = (
        "import socket, sys; own = socket.create_connection((sys.argv[1], 7)); own.sendall(sys.argv[2].encode())\n"
        "print(own.makefile().readline().split()[0])"
    )
    async with stage.app(getattr(stage, program)) as app:
        await app(
            "children = [subprocess.Popen([copy, '-I', '-S', '-c', told, address, f'i am {number:02}'],"
            " stdout=subprocess.PIPE, text=True) for number, copy in enumerate(copies)]",
            copies=[str(copy) for copy in copies], told=told, address=str(SERVER[version]),
        )  # fmt: skip
        seen_as = await app("[child.communicate()[0].strip() for child in children]")

    assert [] == [flow for flow in await stage.daemon.flows() if flow["verdict"] == "block"]
    assert [str(SEEN_AS[side][version])] * MANY == seen_as
    assert {side} == await stage.where(protocol="tcp", address=SERVER[version])
    frames = getattr(stage.lab, side).seen("tcp", destination=SERVER[version], payload=b"i am")
    assert {b"i am %02d" % number for number in range(MANY)} == {frame.payload for frame in frames}


async def test_a_waiting_child_follows_when_its_parent_becomes_excluded(stage, included):
    """L5, st7: of another program, and bound to the tunnel's address all the same; and it follows back."""
    child = await bear(included, agent(stage.lab.copy_program("python", "child")))
    assert await is_on(stage, child, "tunnel")
    for verb, side in (("add", "uplink"), ("remove", "tunnel")):
        await stage.daemon.command("app", verb, str(stage.included))
        assert await is_on(stage, child, side)
        for version in (4, 6):
            for protocol in ("tcp", "udp"):
                own = f"own = {protocol}(SERVER{version}, source='{HOST_TUNNEL[version]}'); own.send(b'bound')"
                await child(own)
                assert str(SEEN_AS[side][version]) == (await child("own.recv(100).split()[0]")).decode()
        assert {side} == await stage.where(address=SERVER[4])
        assert {side} == await stage.where(address=SERVER[6])


async def test_a_childs_connections_end_with_the_switch_of_its_parent(stage, included):
    """L2, L5: the child is of another program; nothing of its four sockets is seen after the command."""
    child = await bear(included, agent(stage.lab.copy_program("python", "child")))
    await hammer.begin(child)
    await until(lambda: hammer.is_seen(stage.lab.tunnel), "all four of the child talk in the tunnel")
    await stage.daemon.command("app", "add", str(stage.included))
    last = (await child("list(said)"))[0]
    await hammer.until_ended(child)
    assert await is_on(stage, child, "uplink")

    for word in hammer.CONNECTED:
        assert last >= max([0, *hammer.numbers(stage.lab.tunnel, word)])
        assert [] == hammer.numbers(stage.lab.uplink, word)


@SIDES
async def test_a_daemon_stays_where_it_was_born(stage, program, side):
    """L6: forked twice, its session its own, an orphan, another program by now; whoever was listed is gone."""
    other, between = stage.lab.copy_program("python", "other"), getattr(stage, program)
    async with stage.app(stage.lab.copy_program("python", "relay")) as relay:
        daemon = await bear_daemon(relay, between, other, wait_known=look(stage.daemon))
        assert 1 == await daemon("os.getppid()")
        assert await is_on(stage, daemon, side)
        lines = await listed(stage, daemon.pid)

    assert (side == "uplink") == bool(lines)
    for line in lines:
        assert f"({stage.excluded}), which has exited" in line
        assert str(other) in line


async def test_a_rule_that_comes_later_finds_the_orphans_of_who_is_dead(stage):
    """L5, L6: their ancestor was never listed while it lived."""
    other, between = stage.lab.copy_program("python", "other"), stage.lab.copy_program("python", "between")
    async with stage.app(stage.included) as relay:
        daemon = await bear_daemon(relay, between, other, wait_known=look(stage.daemon))
        assert await is_on(stage, daemon, "tunnel")
        await stage.daemon.command("app", "add", str(between))
        assert await is_on(stage, daemon, "uplink")
        assert await is_on(stage, relay, "tunnel")


async def test_another_program_in_the_same_process_keeps_what_was_inherited(stage, excluded, included):
    """L6: twice another program; the included parent's child is the control."""
    programs = [stage.lab.copy_program("python", name) for name in ("first", "second", "third")]
    for parent, side in ((excluded, "uplink"), (included, "tunnel")):
        child = await bear(parent, agent(programs[0]))
        for program in programs[1:]:
            await child.become(program)
            assert str(program) == await child("os.readlink('/proc/self/exe')")
            assert await is_on(stage, child, side)


@pytest.mark.parametrize(
    ("first", "then", "old", "new"),
    [("excluded", "included", "uplink", "tunnel"), ("included", "excluded", "tunnel", "uplink")],
)
async def test_who_becomes_another_program_is_judged_by_that(stage, first, then, old, new):
    """L6, L27: a rule is its program's; the connections that are taken along end, on the side where they were."""
    before, after = getattr(stage.lab, old), getattr(stage.lab, new)
    async with stage.app(stage.lab.copy_program("python", "relay")) as relay:
        child = await bear(relay, agent(getattr(stage, first)))
        await child("own = [tcp(SERVER4), tcp(SERVER6), udp(SERVER4), udp(SERVER6)]")
        await child("for one in own: one.send(b'first program'); one.recv(100); os.set_inheritable(one.fileno(), True)")
        numbers = await child("[one.fileno() for one in own]")
        await child.become(getattr(stage, then))
        await child(
            "taken = [socket.socket(fileno=number) for number in numbers]\nended = []\n"
            "for one in taken:\n"
            "    try:\n"
            "        for _ in range(3): one.send(b'second program'), one.recv(100)\n"
            "    except OSError as error: ended.append(error.errno)",
            numbers=numbers,
        )  # fmt: skip
        ended = await child("ended")
        assert len(numbers) == len(ended), ended
        assert {old} == await stage.where(payload=b"first program")
        assert set() == await stage.where(payload=b"second program")
        assert all(hammer.resets(before, version) and not hammer.resets(after, version) for version in (4, 6))
        assert await is_on(stage, child, new)


async def test_a_removed_rule_takes_with_it_just_what_it_alone_caused(lab):
    """L6: of two reasons one is left; a child born before, of a third program, has only the other."""
    first, second, third = (lab.copy_program("python", name) for name in ("first", "second", "third"))
    async with open_stage(lab, [first, second]) as stage, stage.app(first) as parent:
        both = await bear(parent, agent(second))
        one = await bear(parent, agent(third))
        assert await is_on(stage, both, "uplink")
        assert await is_on(stage, one, "uplink")
        (line,) = await listed(stage, both.pid)
        assert f"rule 2: {second}; inherited from {parent.pid} ({first})" in line

        await stage.daemon.command("app", "remove", str(first))
        assert await is_on(stage, both, "uplink")
        assert await is_on(stage, one, "tunnel")
        assert await is_on(stage, parent, "tunnel")

        await stage.daemon.command("app", "remove", str(second))
        assert await is_on(stage, both, "tunnel")
        assert "no process is on the list" in (await stage.daemon.command("pid", "list")).stdout


async def test_who_inherits_nothing_is_an_app_of_its_own(lab):
    """SPEC.md, "Splitting rules": `inherit = false`."""
    parent_path, child_path = (lab.copy_program("python", name) for name in ("parent", "child"))
    config = lab.config([parent_path])
    async with lab.tunsplit(config + "inherit = false\n") as daemon:
        stage = Stage(lab, daemon, parent_path, child_path)
        async with stage.app(parent_path) as parent:
            other, same = await bear(parent, agent(child_path)), await bear(parent, agent(parent_path))
            assert await is_on(stage, parent, "uplink")
            assert await is_on(stage, other, "tunnel")
            assert await is_on(stage, same, "uplink")
