"""The stage of tests of NAT's outside ports: who has ports, and what the kernel was told of."""

from collections import Counter

from tests.craft import ends
from tests.fakes.devices import FAR4, TCP, TUN4, UDP, Side
from tests.fakes.judges import FakeDeaths, as_real
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import Nat
from tunsplit.engine.ports import PortPool
from tunsplit.kernel.liveports import TableMissing
from tunsplit.tasks.handovers import Handovers
from tunsplit.tasks.portchoice import SETS, PortChoice

FLOW = f"{TUN4}:5000 > {FAR4}:443"


class FakeLivePorts:
    """The sets of the nft table."""

    def __init__(self):
        self.sets: dict[str, set[int]] = {name: set() for names in SETS.values() for name in names}
        self.error: Exception | None = None
        self.missing = False

    def _check(self):
        if self.missing:
            raise TableMissing("gone")
        if self.error:
            raise self.error

    def is_there(self):
        return not self.missing

    def add(self, name, ports):
        self._check()
        self.sets[name].update(ports)

    def delete(self, name, ports):
        self._check()
        self.sets[name].difference_update(ports)


class FakeKernel:
    """Both SockDiag and Conntrack, on a host where nobody else has a port."""

    def __init__(self):
        self.error: Exception | None = None
        self.asked: list[tuple[object, ...]] = []
        self.tracked: dict[tuple[object, ...], object] = {}

    def is_bound(self, *_):
        if self.error:
            raise self.error
        return False

    def has_entry(self, *what):
        self.asked.append(what)
        return False

    def find(self, protocol, *what):
        self.asked.append(what)
        return self.tracked.get(what) if protocol == UDP else None


class World:
    def __init__(self):
        self.deaths, self.counters = FakeDeaths(), Counter[str]()
        self.handovers = Handovers(as_real(self.deaths), Hold(1.0), self.counters)
        self.side = Side("tunnel")
        self.nat = Nat({name: PortPool(49152, 65535, lambda _: 0) for name in ("tcp", "udp", "echo")})
        self.live, self.kernel = FakeLivePorts(), FakeKernel()
        self.ports = PortChoice(self.nat, as_real(self.live), as_real(self.kernel), as_real(self.kernel))
        self.told: list[str] = []
        self.ports.on_missing = lambda: self.told.append("missing")
        self.way = self.side.way()

    def choose(self, protocol=TCP, text=FLOW, now=0.0, user=None):
        return self.ports.choose(protocol, ends(text).key, self.way, now, user)

    def open(self, protocol=TCP, text=FLOW):
        port = self.choose(protocol, text)
        return self.nat.open(protocol, ends(text).key, self.way, port, 0.0)

    def take_all_but(self, count, name="tcp"):
        pool = self.nat.pools[name]
        while (places := pool.statistics())["free"] or places["reserved"] > count:
            if pool.must_reserve:
                pool.reserve(0.0)
            pool.draw()
