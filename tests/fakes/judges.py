"""Attribution, policy and the network as a test wants them, for what admits flows."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import trio

from tests.craft import ends
from tests.fakes.devices import HOST4, HOST6, ROUTER4, ROUTER6, ROUTER_MAC, SIGNER, TUN4, TUN6, WG0, FakeTun, Side, nat
from tunsplit.engine.attribution import Attribution, Certainty, Key, Owner
from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import PORT_POOLS
from tunsplit.engine.policy import Judgement, Policy, Verdict
from tunsplit.engine.reasons import Reason
from tunsplit.engine.rewrites import Way
from tunsplit.engine.rules import Rule
from tunsplit.engine.sides import Sides
from tunsplit.engine.slowpath import SlowPath
from tunsplit.errors import KernelError
from tunsplit.kernel.sockdeaths import BATCH, Death
from tunsplit.process import Executable, FileIdentity, Process
from tunsplit.tasks.admit import Admit
from tunsplit.tasks.answers import Answers
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.dnsproxy import Asker, Reply
from tunsplit.tasks.forward import Forward
from tunsplit.tasks.handovers import Handovers
from tunsplit.tasks.opening import Opening
from tunsplit.tasks.portchoice import Asked
from tunsplit.tasks.pump import Pump
from tunsplit.tasks.tuns import Tuns
from tunsplit.wire.ip import UDP

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
        self.accepted: set[int] = set()
        self.ended: list[tuple[int, bytes, bytes | None]] = []
        self.steps = 2
        self.error: Exception | None = None  # of every question
        self.asked: list[int] = []
        self.searched: list[int] = []
        self.searches: list[list[int]] = []  # what was searched for at once
        self.users: dict[int, int] = {}

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

    def listens(self, port: int, executable: str) -> None:
        """Nobody has accepted the connection yet."""
        self.at_once[port] = Attribution("tcp listener", owner(executable, Certainty.INHERITED), b"listener")

    def accepts(self, port: int, executable: str) -> None:
        """This program has."""
        self.knows(port, executable, b"accepted")
        self.accepted.add(port)

    def end(self, protocol: int, four_tuple: bytes, cookie: bytes | None) -> None:
        self.ended.append((protocol, four_tuple, cookie))

    def is_accepted(self, four_tuple: bytes) -> bool:
        if self.error:
            raise self.error
        return int.from_bytes(four_tuple[-4:-2], "big") in self.accepted

    def search(self, flows: Sequence[Key]) -> Iterator[tuple[Key, Attribution] | None]:
        ports = {key: int.from_bytes(key[1][-4:-2], "big") for key in flows}
        self.searched += ports.values()
        self.searches.append([*ports.values()])
        for _ in range(self.steps):
            if self.error:
                raise self.error
            yield None
        for key, port in ports.items():
            if (found := self.found.get(port)) is not None:
                yield key, found

    def user(self, _: int, four_tuple: bytes) -> int | None:
        return self.users.get(int.from_bytes(four_tuple[-4:-2], "big"))

    def cookie(self, _: int, four_tuple: bytes, *, all_sockets: bool = True) -> bytes | None:
        if self.error:
            raise self.error
        return self.cookies.get(int.from_bytes(four_tuple[-4:-2], "big"))


class FakeJudge:
    """Judges by the programs of the holders alone."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.failure: str | None = None
        self.clients: set[str] = set()  # programs
        self.sockets: Collection[int] = ()  # of the flow that was judged last

    def prepare(self) -> None:
        pass

    def tell(self) -> None:
        pass

    def judge(self, owner: Owner | None, sockets: Collection[int] = ()) -> Judgement:
        self.sockets = sockets
        return self.policy.judge(owner, self._reasons)

    def is_client(self, owner: Owner | None) -> bool:
        programs = {one.executable.path for one in owner.holders if one.executable} if owner else set()
        return bool(programs) and programs <= self.clients

    def _reasons(self, one: Process) -> tuple[Reason, ...]:
        return tuple(Reason(rule.number, rule.label) for rule in self.policy.rules if rule.claims(one))

    def statistics(self) -> dict[str, int]:
        return {}


class FakeHeirs:
    """Doubts the senders of what comes from these ports."""

    def __init__(self) -> None:
        self.doubted: set[int] = set()
        self.error: Exception | None = None
        self.asked: list[tuple[Any, ...]] = []

    def doubts(self, four_tuple: bytes, *others: Any, held: bool = False) -> bool:
        self.asked.append((*others, held))
        if self.error:
            raise self.error
        return int.from_bytes(four_tuple[-4:-2], "big") in self.doubted


class FakeNetwork:
    """Two sides, with one gateway each."""

    def __init__(self) -> None:
        self.uplink, self.tunnel = Side(), Side("tunnel", WG0)
        self.closed: set[str] = set()
        self.lost: set[str] = set()
        self.error: Exception | None = None
        self.signer: dict[int, bytes] = dict(SIGNER)
        self.sides = Sides()
        self.failure: str | None = None
        self.hear: Callable[[], None] = lambda: None
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

    def own_addresses(self, version: int) -> list[bytes]:
        return [ip_address(HOST4 if version == 4 else HOST6).packed]

    def is_local(self, address: bytes) -> bool:
        return str(ip_address(address)) not in self.lost

    def is_address_of(self, device: object, address: bytes) -> bool:
        return device is self.uplink.device and address == ip_address("192.168.50.3").packed

    @property
    def devices(self) -> Any:
        return SimpleNamespace(all=lambda: [self.uplink.device, self.tunnel.device])

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
        self.questions: dict[bytes, Asked] = {}
        self.counters: Counter[str] = Counter()
        self.error: Exception | None = None

    def asked(self, key: bytes, _: Way, __: list[bytes]) -> Asked | None:
        return self.questions.get(key)

    def choose(self, protocol: int, key: bytes, way: Way, *_: object, **__: object) -> int | None:
        if self.error:
            raise self.error
        if not self.room:
            return None
        if protocol not in PORT_POOLS:
            return 0 if self._table.is_free(protocol, key, way, 0) else None
        if (port := self._table.mapped_port(protocol, key, way)) is not None:
            return int(port)
        pool = self._table.pools[PORT_POOLS[protocol]]
        if pool.must_reserve:
            pool.reserve(0.0)
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


class FakeDeaths:
    """Sockets die as a test says: a list of deaths, or an error, is what a read comes to."""

    def __init__(self) -> None:
        self.told: list[Death] = []
        self.fails = ""
        self.overruns = 0

    def dies(self, port: int, cookie: bytes, protocol: int = UDP) -> None:
        self.told.append(Death(protocol, port.to_bytes(2, "big"), cookie))

    def read(self) -> list[Death]:
        if self.fails:
            raise KernelError(self.fails)
        told, self.told = self.told[:BATCH], self.told[BATCH:]
        return told


class Gate:
    """An Admit with fakes all around, and the tun's pump in front of it."""

    def __init__(self, *, hold_s: float = 1.0, protocols: frozenset[int] = frozenset(), **judging: Any) -> None:
        self.tun, self.guests = FakeTun(), FakeTun()
        self.tuns = Tuns(as_real(self.tun), as_real(self.guests))
        self.nat = nat()
        self.network = FakeNetwork()
        self.uplink, self.tunnel = self.network.uplink, self.network.tunnel
        self.source = FakeSource()
        self.ports = FakePorts(self.nat)
        self.claimed: set[int] = set()  # destination ports that IPsec has
        self.counters: Counter[str] = Counter()
        self.hold = Hold(hold_s)
        self.deaths = FakeDeaths()
        self.handovers = Handovers(as_real(self.deaths), self.hold, self.counters)
        self.heirs = FakeHeirs()
        self.judge = FakeJudge(policy(unattributed=judging.get("unattributed", Verdict.BLOCK)))
        self.answers = Answers(self.tuns, as_real(self.network))
        self.proxy = FakeProxy()
        self.dns = DnsCapture(
            tuns=self.tuns,
            nat=self.nat,
            network=as_real(self.network),
            answers=self.answers,
            ask=self.proxy.ask,
            table=DnsTable("linux", relay=(RELAY4,)),
            is_resolver=lambda _: False,
            is_client=self.judge.is_client,
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
            opening=Opening(
                self.nat, as_real(self.network), as_real(self.source), self.dns, as_real(self.ports), self.claims
            ),
            answers=self.answers,
            hold=self.hold,
            handovers=self.handovers,
            heirs=as_real(self.heirs),
            protocols=protocols,
        )

        self.heard: list[tuple[Any, ...]] = []
        self.forward = Forward(
            nat=self.nat,
            slow=SlowPath(self.nat.forwarded, self.counters, outbound=True),
            judge=lambda: self.judge.policy.judge_forwarded(),
            dns=self.dns,
            ports=as_real(self.ports),
            answers=self.answers,
            claimed=self.claims,
            send=self.admit.send,
            protocols=protocols,
        )
        self.pump = Pump(
            self.tuns,
            self.nat,
            self.admit.passed_by,
            self.forward.passed_by,
            self.counters,
            heard=lambda *told: self.heard.append(told),
            unclaimed=lambda *_: None,
        )

    def run(self, nursery: trio.Nursery) -> None:
        """Start what the daemon starts."""
        nursery.start_soon(self.pump.run)
        nursery.start_soon(self.admit.search)
        nursery.start_soon(self.admit.release_late)

    def claims(self, _: int, key: bytes, __: Way) -> bool:
        return int.from_bytes(key[-2:], "big") in self.claimed

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
        for tun in (self.tun, self.guests):
            tun.close()
        self.uplink.close()
        self.tunnel.close()
