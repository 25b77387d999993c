"""Attribution, policy and the network as a test wants them, for what admits flows."""

from collections import Counter
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import trio

from tests.craft import ends
from tests.fakes.devices import HOST4, HOST6, ROUTER4, ROUTER6, ROUTER_MAC, SIGNER, TUN4, TUN6, WG0, FakeTun, Side, nat
from tunsplit.engine.attribution import Attribution, Certainty, Owner
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import PORT_POOLS, Way
from tunsplit.engine.policy import Judgement, Policy, Verdict
from tunsplit.engine.reasons import Reason
from tunsplit.engine.rules import Rule
from tunsplit.engine.sides import Sides
from tunsplit.engine.slowpath import SlowPath
from tunsplit.process import Executable, FileIdentity, Process
from tunsplit.tasks.admit import Admit
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.dnsproxy import Asker, Reply
from tunsplit.tasks.pump import Pump
from tunsplit.tasks.side import SideDevice

EXCLUDED, INCLUDED = "/opt/excluded", "/opt/included"
FILE = FileIdentity(1, 1, 0)
RELAY4 = ip_address("10.64.0.2")


def process(executable: str = INCLUDED, pid: int = 100) -> Process:
    return Process(pid, 1, 1, 1000, executable=Executable(executable, False, FILE, FILE))


def owner(executable: str = INCLUDED, certainty: Certainty = Certainty.EXACT) -> Owner:
    return Owner((process(executable),), certainty)


class Named:
    """Matches a program by its path alone."""

    def __init__(self, path: str) -> None:
        self.path = path

    def matches(self, one: Process) -> bool:
        return one.executable is not None and one.executable.path == self.path


def policy(**others: Any) -> Policy:
    return Policy((Rule(1, EXCLUDED, (Named(EXCLUDED),)),), **others)


def as_real(fake: object) -> Any:
    """A fake in the place of what it stands for."""
    return fake


class FakeSource:
    """Knows owners `at_once` or after a search of some `steps`, by source port."""

    def __init__(self) -> None:
        self.at_once: dict[int, Attribution] = {}
        self.found: dict[int, Attribution] = {}
        self.cookies: dict[int, bytes] = {}
        self.steps = 2
        self.error: Exception | None = None  # of every question
        self.asked: list[int] = []
        self.searched: list[int] = []

    def note_newcomer(self, protocol: int, key: bytes) -> None:
        pass

    def knows(self, port: int, executable: str, cookie: bytes | None = None) -> None:
        self.at_once[port] = Attribution("tcp socket", owner(executable), cookie)
        if cookie:
            self.cookies[port] = cookie

    def finds(self, port: int, executable: str) -> None:
        self.found[port] = Attribution("tcp socket", owner(executable))

    def attribute(self, _: int, four_tuple: bytes) -> Attribution | None:
        port = int.from_bytes(four_tuple[-4:-2], "big")
        self.asked.append(port)
        if self.error:
            raise self.error
        return self.at_once.get(port)

    def search(self, _: int, four_tuple: bytes) -> Iterator[Attribution | None]:
        port = int.from_bytes(four_tuple[-4:-2], "big")
        self.searched.append(port)
        for _ in range(self.steps):
            if self.error:
                raise self.error
            yield None
        yield self.found.get(port)

    def cookie(self, _: int, four_tuple: bytes, *, all_sockets: bool = True) -> bytes | None:
        if self.error:
            raise self.error
        return self.cookies.get(int.from_bytes(four_tuple[-4:-2], "big"))


class FakeJudge:
    """Judges by the programs of the holders alone."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.failure: str | None = None

    def prepare(self) -> None:
        pass

    def judge(self, owner: Owner | None) -> Judgement:
        return self.policy.judge(owner, self._reasons)

    def _reasons(self, one: Process) -> tuple[Reason, ...]:
        return tuple(Reason(rule.number, rule.label) for rule in self.policy.rules if rule.claims(one))

    def statistics(self) -> dict[str, int]:
        return {}


class FakeNetwork:
    """Two sides, with one gateway each."""

    def __init__(self) -> None:
        self.uplink, self.tunnel = Side(), Side("tunnel", WG0)
        self.closed: set[str] = set()
        self.error: Exception | None = None
        self.signer: dict[int, bytes] = dict(SIGNER)
        self.sides = Sides()
        self.failure: str | None = None
        for gateway in (ROUTER4, ROUTER6):
            self.uplink.neighbour(gateway, ROUTER_MAC)

    def way(self, side: str, version: int, _: bytes) -> Way | None:
        if self.error:
            raise self.error
        if side in self.closed:
            return None
        if side == "tunnel":
            return self.tunnel.way(RELAY4, version=version, source=str(RELAY4) if version == 4 else "fd64::2")
        gateway = ROUTER4 if version == 4 else ROUTER6
        return self.uplink.way(gateway, version=version, source=HOST4 if version == 4 else HOST6)

    def is_address_of(self, device: object, address: bytes) -> bool:
        return device is self.uplink.device and address == ip_address("192.168.50.3").packed

    def devices(self) -> list[SideDevice]:
        return [self.uplink.device, self.tunnel.device]

    def own_router(self, version: int) -> bytes | None:
        return self.signer.get(version)

    def own_address(self, version: int) -> bytes | None:
        return ip_address(TUN4 if version == 4 else TUN6).packed

    @property
    def tunnel_up(self) -> bool:
        return self.sides.tunnel is not None


class FakePorts:
    """Gives ports from the pools, as long as there is `room`."""

    def __init__(self, table: Any) -> None:
        self._table = table
        self.room = True
        self.counters: Counter[str] = Counter()
        self.error: Exception | None = None

    def asked_port(self, _: bytes, __: Way) -> int | None:
        return None

    def choose(self, protocol: int, key: bytes, way: Way, _: float) -> int | None:
        if self.error:
            raise self.error
        if not self.room:
            return None
        if (port := self._table.mapped_port(protocol, key, way)) is not None:
            return int(port)
        pool = self._table.pools[PORT_POOLS[protocol]]
        if pool.must_reserve:
            pool.reserve()
        drawn = pool.draw()
        assert drawn is not None
        return int(drawn)


class FakeProxy:
    """Answers each question when the test says so."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, Asker]] = []
        self.replies: list[Reply] = []

    def ask(self, message: bytes, asker: Asker, reply: Reply, _: float) -> None:
        self.asked.append((message, asker))
        self.replies.append(reply)


class Gate:
    """An Admit with fakes all around, and the tun's pump in front of it."""

    def __init__(self, *, hold_s: float = 1.0, protocols: frozenset[int] = frozenset(), **judging: Any) -> None:
        self.tun = FakeTun()
        self.nat = nat()
        self.network = FakeNetwork()
        self.uplink, self.tunnel = self.network.uplink, self.network.tunnel
        self.source = FakeSource()
        self.ports = FakePorts(self.nat)
        self.counters: Counter[str] = Counter()
        self.hold = Hold(hold_s)
        self.judge = FakeJudge(policy(unattributed=judging.get("unattributed", Verdict.BLOCK)))
        self.answers = Answers(as_real(self.tun), as_real(self.network))
        self.proxy = FakeProxy()
        self.dns = DnsCapture(
            tun=as_real(self.tun),
            nat=self.nat,
            network=as_real(self.network),
            answers=self.answers,
            ask=self.proxy.ask,
            table=DnsTable("linux", relay=(RELAY4,)),
            is_resolver=lambda _: False,
            random_below=lambda _: 0,
        )
        self.admit = Admit(
            nat=self.nat,
            slow=SlowPath(self.nat.outbound, self.counters, outbound=True),
            source=as_real(self.source),
            sources=(as_real(self.source),),
            judge=as_real(self.judge),
            network=as_real(self.network),
            dns=self.dns,
            ports=as_real(self.ports),
            answers=self.answers,
            hold=self.hold,
            protocols=protocols,
        )

        self.pump = Pump(as_real(self.tun), self.nat, self.admit.passed_by, self.counters)

    def run(self, nursery: trio.Nursery, *, workers: int = 1) -> None:
        """Start what the daemon starts."""
        nursery.start_soon(self.pump.run)
        for _ in range(workers):
            nursery.start_soon(self.admit.search)
        nursery.start_soon(self.admit.release_late)

    def passes(self, *packets: bytes, header: bytes = bytes(10)) -> None:
        """Hand packets to the gate that no flow takes."""
        for packet in packets:
            self.admit.passed_by(header, packet, self.now)

    now = 100.0

    def flow(self, text: str, protocol: int) -> Any:
        found = self.nat.outbound.find(protocol, ends(text).key)
        return found.flow if found else None

    def close(self) -> None:
        self.pump.close()
        self.tun.close()
        self.uplink.close()
        self.tunnel.close()
