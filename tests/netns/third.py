"""A third network: a second wire between the host and the router, without a default route, watched."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from tunsplit.lab import Lab
from tunsplit.lab.frames import Seen
from tunsplit.lab.observer import Observer

OWN = {4: "192.168.60.2", 6: "fd60::2"}
NEIGHBOUR = {4: "192.168.60.1", 6: "fd60::1"}
NOBODY = {4: "192.168.60.77", 6: "fd60::77"}
DEVICE = "eth1"


@asynccontextmanager
async def open_third(lab: Lab, *, plugged: bool = True) -> AsyncIterator[Observer]:
    """Watch the router's end of the wire; the host's end is there, or comes with `plug`."""
    lab.router.ip(
        f"link add lan1 type veth peer name {DEVICE}\nlink set lan1 up\n"
        f"address add {NEIGHBOUR[4]}/24 dev lan1\naddress add {NEIGHBOUR[6]}/64 dev lan1"
    )
    if plugged:
        plug(lab)
    async with lab.observe(lab.router, "lan1", find_sender=lambda: (lab.host, DEVICE)) as observer:
        yield observer


def plug(lab: Lab) -> None:
    """Give the host its end."""
    lab.router.ip(f"link set {DEVICE} netns {lab.host.name}")
    lab.host.ip(f"link set {DEVICE} up\naddress add {OWN[4]}/24 dev {DEVICE}\naddress add {OWN[6]}/64 dev {DEVICE}")


async def sent(third: Observer, **wanted: Any) -> list[Seen]:
    """What the host has sent there so far."""
    await third.settle()
    assert third.dropped == 0
    return [seen for seen in third.seen(**wanted) if seen.direction == "out"]
