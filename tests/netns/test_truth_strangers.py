"""Processes that are not what they look like, and those that nobody saw: never guessed (L21, L29)."""

import contextlib
import os
import signal

import pytest

from tests.netns.family import agent, bear
from tests.netns.kinship import CLONE_PARENT, clone
from tests.netns.sides import is_on
from tests.netns.stage import REFUSED, SERVER, until

pytestmark = pytest.mark.netns

# More events than the queue holds; a thread's are as good as a process's, and cheaper.
STORM = """
import threading
for _ in range(30_000):
    one = threading.Thread(target=int)
    one.start()
    one.join()
"""


async def is_nowhere(stage, app, payload="a stranger"):
    """Whether an app is refused, and visible as nobody's."""
    for version in (4, 6):
        with pytest.raises(OSError, match=REFUSED):
            await app(f"tcp(SERVER{version})")
        await app(f"own{version} = udp(SERVER{version}); own{version}.send(payload.encode())", payload=payload)

    async def is_told():
        flows = [flow for flow in await stage.daemon.flows() if flow["app"] and flow["app"]["pid"] == app.pid]
        return {("block", "unattributed")} == {(flow["verdict"], flow["reason"]) for flow in flows} and len(flows) >= 4

    await until(is_told, "all four flows are shown as blocked")
    return set() == await stage.where(payload=payload.encode())


@pytest.mark.parametrize(
    ("first", "then", "side"), [("excluded", "included", "tunnel"), ("included", "excluded", "uplink")]
)
async def test_who_gets_the_pid_of_a_dead_one_gets_nothing_else(stage, first, then, side):
    """SPEC.md, "Processes are known by (pid, start time)": the very same pid, of another program and of the same."""
    old, new = getattr(stage, first), getattr(stage, then)
    other = {"uplink": "tunnel", "tunnel": "uplink"}[side]
    async with stage.app(stage.lab.copy_program("python", "relay")) as relay:
        dead = await bear(relay, agent(old))
        assert await is_on(stage, dead, other)
        await dead("own = udp(SERVER4); own.send(b'before'); own.recv(100)")
        if side == "tunnel":
            await stage.daemon.command("pid", "add", str(dead.pid))
        await dead.end()
        stranger = await clone(relay, new, pid=dead.pid)
        assert dead.pid == stranger.pid == await stranger("os.getpid()")
        assert await is_on(stage, stranger, side)
        # Its children are its own, not the dead one's.
        assert await is_on(stage, await bear(stranger, agent(stage.lab.copy_program("python", "third"))), side)


@pytest.mark.parametrize(("program", "side"), [("excluded", "uplink"), ("included", "tunnel")])
async def test_a_child_that_is_made_a_sibling_has_no_parent_to_inherit_from(stage, program, side):
    """L29: by CLONE_PARENT, event and /proc name one whose program it does not run; the plain clone is the control."""
    third = stage.lab.copy_program("python", "third")
    async with stage.app(third) as relay:
        parent = await bear(relay, agent(getattr(stage, program)))
        child = await clone(parent)
        assert parent.pid == await child("os.getppid()")
        assert await is_on(stage, child, side)
        sibling = await clone(parent, flags=CLONE_PARENT)
        assert relay.pid == await sibling("os.getppid()")
        stage.clear()
        # A rule for what it runs itself holds all the same.
        assert await (is_on(stage, sibling, side) if side == "uplink" else is_nowhere(stage, sibling))
        stage.clear()
        await sibling.become(third)
        assert await is_nowhere(stage, sibling)
        assert set() == await stage.where(destination=SERVER[4])
        await child.become(third)
        assert await is_on(stage, child, side)


async def test_after_lost_events_only_what_is_known_is_judged(stage, excluded, included):
    """L21, L29: tunsplit stands still while processes are born by the thousand; then it looks at all of them anew."""
    third = stage.lab.copy_program("python", "third")
    for app, side in ((excluded, "uplink"), (included, "tunnel")):
        assert await is_on(stage, app, side, clear=False)
        await app("own = udp(SERVER4); own.send(b'?'); own.recv(100); stream = tcp(SERVER6); line = read_line(stream)")
    await included("left = [udp(SERVER4), udp(SERVER6)]\nfor one in left: one.send(b'?'); one.recv(100)")
    os.kill(stage.daemon.pid, signal.SIGSTOP)
    try:
        await stage.lab.host.run([stage.lab.copy_program("python", "storm"), "-I", "-S", "-c", STORM])
        children = [await bear(app, agent(third)) for app in (excluded, included)]
        for app, name in ((excluded, "excluded"), (included, "included")):
            await app("own.send(told.encode())", told=f"{name} waited")
            await app("fresh = udp(SERVER6); fresh.send(told.encode())", told=f"{name} anew")
        for child, name in zip(children, ("excluded", "included"), strict=True):
            await child("own = udp(SERVER4); own.send(told.encode())", told=f"{name} child")
        numbers = await included("[one.fileno() for one in left]")
        heir = await bear(included, agent(stage.excluded), numbers)
        await heir("left = [socket.socket(fileno=number) for number in numbers]", numbers=numbers)
        await heir("for one in left: one.send(b'an heir')")
    finally:
        os.kill(stage.daemon.pid, signal.SIGCONT)

    for app, name in ((excluded, "excluded"), (included, "included")):
        assert name.encode() == await app("stream.send(name.encode()) and read_exactly(stream, 8)", name=name)
        assert f"{name} waited".encode() == await app("own.recv(100).split(b'\\n')[1]")
    assert 1 <= await stage.counter("process_events_overrun")
    # Its exec was lost as well, and the flows that it has inherited were open.
    with contextlib.suppress(OSError):
        await heir("for one in left: one.send(b'an heir')")
    assert set() == await stage.where(payload=b"an heir")
    # Born unseen of one that is listed, it is listed; of another, there may be somebody between who was.
    assert await is_on(stage, children[0], "uplink", clear=False)
    assert await is_nowhere(stage, children[1])
    assert {"uplink"} == await stage.where(payload=b"excluded waited")
    assert {"tunnel"} == await stage.where(payload=b"included waited")
    # A first packet may have waited for too long under load, and been refused.
    assert await stage.where(payload=b"excluded anew") | await stage.where(payload=b"excluded child") <= {"uplink"}
    assert await stage.where(payload=b"included anew") <= {"tunnel"}
    assert set() == await stage.where(payload=b"included child")
    for app, side in ((excluded, "uplink"), (included, "tunnel")):
        assert await is_on(stage, await bear(app, agent(third)), side, clear=False)
