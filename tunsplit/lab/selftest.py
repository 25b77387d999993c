"""`tunsplit selftest`: what is promised, shown in a throw-away network on this very kernel.

Each promise is an attempt of two apps, with both wires watched. Before tunsplit starts, and after it was killed and
undone, the same observers have to see an app on the uplink, where it never is in between: else they prove nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from subprocess import CalledProcessError
from typing import Any

import trio

from tunsplit.errors import TunsplitError
from tunsplit.lab.apps import start_app
from tunsplit.lab.lab import Lab, open_lab
from tunsplit.lab.promises import PROMISES, Promise
from tunsplit.lab.scene import SERVERS, BrokenPromise, Scene, open_scene

PATIENCE_S = 60.0  # no promise takes so long to show
TRIES = 3  # a busy machine may hold a first packet for too long, and refuse it; a leak is one for good
CONTROL = "control"
NOT_SHOWN = (
    "Not among them: L13, L21, L24, L27 to L30, L35, L37 to L39, which take more than a lab and two apps to show; "
    "scripts/test has them all."
)


@dataclass
class Shown:
    """What became of a promise.

    Attributes:
        promise: its names in the list of promises; `control`: of the observers themselves.
        says: what is promised.
        ok: nothing leaked, and what was to happen did.
        uplink: frames of the apps that were watched there.
        tunnel: likewise.
        leaks: what was seen where it may not be.
        failure: what did not happen.
    """

    promise: str
    says: str
    ok: bool = False
    uplink: int = 0
    tunnel: int = 0
    leaks: list[str] = field(default_factory=list)
    failure: str = ""

    @property
    def verdict(self) -> str:
        """The same in a word."""
        return "kept" if self.ok else "LEAKED" if self.leaks else "NOT KEPT"


async def run(
    sections: Mapping[str, Mapping[str, Any]],
    tell: Callable[[Shown], None] = lambda _: None,
    promises: Iterable[Promise] = PROMISES,
) -> list[Shown]:
    """Show promises, one after the other.

    Args:
        sections: of a configuration, laid over the lab's own.
        tell: hears at once what became of each.
        promises: which.
    """
    shown = []
    async with open_lab() as lab:
        shown.append(await show_control(lab))
        tell(shown[0])
        programs = {name: lab.copy_program("python", name) for name in ("excluded", "included")}
        config = lab.config([programs["excluded"]], **{"log": {"level": "warning"}, **sections})
        async with lab.tunsplit(config) as daemon, open_scene(lab, daemon, programs) as scene:
            for promise in promises:
                shown.append(await show(scene, promise))
                tell(shown[-1])
    return shown


async def show_control(lab: Lab) -> Shown:
    """Without tunsplit an app is seen on the uplink, where the tests look for included ones."""
    shown = Shown(CONTROL, "without tunsplit an app is seen on the uplink, so a leak would be")
    async with start_app(lab.host, lab.copy_program("python", "control")) as app:
        for _ in range(TRIES):
            try:
                await app("for protocol in ('tcp', 'udp', 'icmp'): ask(protocol, SERVER4), ask(protocol, SERVER6)")
            except OSError as error:
                shown.failure = str(error)
                continue
            await lab.uplink.settle()
            shown.uplink = sum(len(lab.uplink.seen(address=server)) for server in SERVERS)
            shown.ok = all(lab.uplink.seen(address=server) for server in SERVERS)
            shown.failure = "" if shown.ok else "the observer of the uplink has seen nothing"
            break
    return shown


async def show(scene: Scene, promise: Promise) -> Shown:
    """Show one promise, again if it was not kept and nothing leaked; then forget what was seen."""
    shown = Shown(promise.name, promise.says)
    for _ in range(TRIES if promise is not PROMISES[-1] else 1):
        shown.failure = await _try(scene, promise)
        if scene.leaks or not shown.failure:
            break
    shown.uplink, shown.tunnel, shown.leaks = scene.frames["uplink"], scene.frames["tunnel"], scene.leaks
    shown.ok = not shown.leaks and not shown.failure
    scene.frames.clear()
    scene.leaks = []
    return shown


async def _try(scene: Scene, promise: Promise) -> str:
    try:
        with trio.fail_after(PATIENCE_S):
            await promise.show(scene)
    except trio.TooSlowError:
        return f"not done after {PATIENCE_S:.0f} s"
    except (BrokenPromise, TunsplitError, OSError, AssertionError, CalledProcessError) as error:
        return str(error)
    return ""


def encode(shown: list[Shown]) -> str:
    """The same for programs: one line of JSON, a list."""
    return json.dumps([asdict(one) for one in shown], ensure_ascii=False)


def summarise(shown: list[Shown]) -> str:
    """The last lines: what went wrong, and how it came out."""
    lines = [f"{one.promise}: leaked {leak}" for one in shown for leak in one.leaks]
    lines += [f"{one.promise}: {one.failure}" for one in shown if one.failure]
    uplink, tunnel = sum(one.uplink for one in shown), sum(one.tunnel for one in shown)
    lines.append(f"{uplink} frames of apps were watched on the uplink, {tunnel} in the tunnel.")
    broken, leaks = sum(not one.ok for one in shown), sum(len(one.leaks) for one in shown)
    verdict = f"{broken} of {len(shown)} were not kept, {leaks} flows leaked." if broken else f"All {len(shown)} kept."
    return "\n".join([*lines, NOT_SHOWN, verdict])
