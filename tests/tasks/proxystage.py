"""The DNS proxy between resolvers of this namespace and an app of either kind."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from ipaddress import ip_address

import trio
import trio.testing

from tests.fakes.resolvers import FakeResolver, read, resolvers
from tests.hosts import own_namespace, run, wait_settled
from tunsplit.engine.dnstable import DnsTable, Route
from tunsplit.engine.policy import Verdict
from tunsplit.tasks.dnsproxy import Asker, DnsProxy, boottime

RELAY, RELAY2, SYSTEM, PUBLIC, RELAY6 = "10.64.0.1", "10.64.0.2", "192.168.50.53", "198.51.100.53", "fd64::1"


class FakeNetwork:
    """Both sides are the loopback device, until the test says otherwise."""

    def __init__(self) -> None:
        self.devices: dict[str, str | None] = {"tunnel": "lo", "outside": "lo", "lan": "lo"}
        self.families = {"tunnel": {4, 6}, "outside": {4, 6}, "lan": {4, 6}}
        self.identity = 0

    def side_device(self, route: Route, family: int) -> str | None:
        return self.devices[route.value] if family in self.families[route.value] else None

    def side_identity(self, route: Route) -> int:
        return self.identity


class Stage:
    """The proxy, and an app of either kind."""

    def __init__(self, table: DnsTable, **options) -> None:
        self.network = FakeNetwork()
        self.table = table
        self.proxy = DnsProxy(table, self.network, **options)

    async def ask(self, message: bytes, verdict: Verdict = Verdict.TUNNEL, *, now: float | None = None, **who) -> bytes:
        """Ask, and wait for the answer."""
        send, receive = trio.open_memory_channel[bytes](1)
        asker = Asker(**{"app": None, "verdict": verdict, "asked": ip_address("8.8.8.8"), **who})
        self.proxy.ask(message, asker, send.send_nowait, boottime() if now is None else now)
        with trio.fail_after(20):
            return await receive.receive()


@contextmanager
def loopback() -> Iterator[None]:
    """A namespace of its own, in which the resolvers have their addresses."""
    with own_namespace():
        run("ip", "link", "set", "lo", "up")
        for address in (RELAY, RELAY2, SYSTEM, PUBLIC):
            run("ip", "address", "add", f"{address}/32", "dev", "lo")
        run("ip", "address", "add", f"{RELAY6}/128", "dev", "lo", "nodad")
        wait_settled()
        yield


@asynccontextmanager
async def staged(*fakes: FakeResolver, relay: tuple[str, ...] = (RELAY,), **options) -> AsyncIterator[Stage]:
    table = DnsTable(
        options.pop("platform", "linux"),
        relay=tuple(map(ip_address, relay)),
        system=(ip_address(SYSTEM),),
        custom=tuple(map(ip_address, options.pop("custom", ()))),
        listed_only=options.pop("listed_only", False),
    )
    stage = Stage(table, **options)
    async with resolvers(*fakes), trio.open_nursery() as nursery:
        nursery.start_soon(stage.proxy.run)
        await trio.testing.wait_all_tasks_blocked()
        yield stage
        nursery.cancel_scope.cancel()


def names(message: bytes) -> list[str]:
    return [rrset.to_text() for rrset in read(message).answer]
