"""Why something goes where it goes: the chain of judgement, shown without sending a packet."""

from ipaddress import ip_address, ip_interface

from tunsplit.engine.attribution import Attribution, Owner, search_all
from tunsplit.engine.direction import destination_of, source_of
from tunsplit.engine.interception import Handling
from tunsplit.engine.nat import Nat
from tunsplit.engine.policy import Judgement, Verdict
from tunsplit.engine.reasons import Reason, Reasons
from tunsplit.engine.sides import beside
from tunsplit.errors import TunsplitError
from tunsplit.host import IPAddress
from tunsplit.kernel.procpid import identify, resolve
from tunsplit.process import Executable, Process
from tunsplit.tasks.dnscapture import DnsCapture
from tunsplit.tasks.ipsec import CLAIMED, Ipsec
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.network import Network
from tunsplit.tasks.opening import NO_WAY
from tunsplit.tasks.sources import SocketSource
from tunsplit.wire.ip import NAMES

SIDES = (Handling.TUNNEL, Handling.UPLINK)

Json = dict[str, object]


class Explainer:
    """Asks the organs of judgement, as for a packet."""

    def __init__(
        self, judge: Judge, source: SocketSource, network: Network, nat: Nat, dns: DnsCapture, ipsec: Ipsec
    ) -> None:
        self._judge = judge
        self._dns = dns
        self._source = source
        self._network = network
        self._nat = nat
        self._ipsec = ipsec

    def explain(
        self, *, pid: int | None, exe: str | None, protocol: str | None, source: str | None, destination: str | None
    ) -> Json:
        """The whole chain of judgement, without sending a packet."""
        self._judge.prepare()
        if pid is not None:
            process = self._judge.look_again(pid)
            if process is None:
                raise TunsplitError(f"there is no process {pid}")
            return {"app": _app(process), **self._explained(Owner((process,)))}
        if exe is not None:
            return self._explain_program(exe)
        if protocol is None or source is None or destination is None:
            raise TunsplitError("expected a pid, a program, or protocol, source and destination")
        return self._explain_flow(protocol, source, destination)

    def _explain_program(self, exe: str) -> Json:
        """What the rules say of a program, whoever starts it."""
        path = resolve(exe)
        identity = identify(path)
        if identity is None:
            raise TunsplitError(f"{exe}: there is no such file")
        program = Process(0, 0, 0, -1, Executable(path, False, identity, identity))
        rules = [rule for rule in self._judge.policy.rules if rule.claims(program)]
        reasons: Reasons = tuple(Reason(rule.number, rule.label) for rule in rules)
        judgement = self._judge.policy.judge(Owner((program,)), lambda _: reasons)
        return {
            "app": None,
            "exe": path,
            "reasons": [reason.words for reason in reasons],
            "verdict": judgement.verdict.value,
            "reason": judgement.reason,
            "dns": self._table_row(judgement.verdict),
            "note": "started by an app that is listed, it is listed too; rules by user or cgroup need a process",
        }

    def _explain_flow(self, protocol: str, source: str, destination: str) -> Json:
        number = next((number for number, name in NAMES.items() if name == protocol), None)
        if number is None:
            raise TunsplitError(f"protocol {protocol!r}: expected one of {', '.join(NAMES.values())}")
        key = _key(source, destination)
        forwarded = self._is_guest(ip_address(source_of(key)))
        attribution: Attribution | None = None
        for found in () if forwarded else search_all((self._source,), [(number, key)]):
            attribution = found[1] if found is not None else attribution
        owner = attribution.owner if attribution else None
        way = handling = hindrance = None
        explained = self._explained(owner, self._judge.policy.judge_forwarded() if forwarded else None)
        verdict = str(explained["verdict"])
        if verdict != Verdict.BLOCK.value:
            self._ipsec.hear()
            handling = self._dns.handling(number, key, verdict, owner)
            if handling is None or handling in SIDES:
                side = verdict if handling is None else handling.value
                way = self._network.way(side, 4 if len(key) == 12 else 6, destination_of(key))
                if way is None:
                    hindrance = NO_WAY.format(side)
                elif self._ipsec.claims(number, key, way):
                    hindrance = CLAIMED
        if handling is None:
            del explained["dns"]
        else:
            asked = self._dns.explain(verdict, ip_address(destination_of(key)), client=self._judge.is_client(owner))
            explained["dns"] = {"handling": handling.value, **asked}
        known = (self._nat.forwarded if forwarded else self._nat.outbound).find(number, key)
        return {
            "app": _app(owner.process) if owner else None,
            "found_by": attribution.how if attribution else "forwarded" if forwarded else "no socket",
            "certainty": attribution.certainty.value if attribution else None,
            "sockets": list(attribution.sockets) if attribution else [],
            **explained,
            "hindrance": hindrance,
            "way": None if way is None else {"side": way.side, "source": str(ip_address(way.source))},
            "flow": None if known is None else {"side": known.flow.side, "state": known.flow.state.value},
        }

    def _is_guest(self, address: IPAddress) -> bool:
        """Whether packets from this address are forwarded ones: a guest's own, or what masquerade makes of it."""
        network = self._network
        if any(address == one.interface.ip for one in network.snapshot.addresses):
            own = network.own_address(address.version)
            return own is not None and address == beside([ip_interface(own)])[0].ip
        return any(address in prefix for prefix in network.guests)

    def _explained(self, owner: Owner | None, judgement: Judgement | None = None) -> Json:
        judgement = judgement or self._judge.judge(owner)
        holders: list[Json] = []
        for process in owner.holders if owner else ():
            reasons = self._judge.reasons(process)
            birth = self._judge.tree.birth(process.pid, process.start_time)
            line = self._judge.tree.lineage(process.pid, process.start_time)
            holders.append(
                {
                    **_app(process),
                    "birth": birth.value if birth else "unknown",
                    "parents": [_app(one) for one in line[1:]],
                    "reasons": None if reasons is None else [reason.words for reason in reasons],
                    "client": self._judge.is_client(Owner((process,))),
                }
            )
        return {
            "mode": self._judge.policy.mode.value,
            "enabled": self._judge.policy.enabled,
            "holders": holders,
            "verdict": judgement.verdict.value,
            "reason": judgement.reason,
            "dns": self._table_row(judgement.verdict, client=self._judge.is_client(owner)),
        }

    def _table_row(self, verdict: Verdict, *, client: bool = False) -> Json | None:
        """Where the questions of an app go; None: nowhere, since nothing of it does."""
        return None if verdict is Verdict.BLOCK else self._dns.explain(verdict.value, client=client)


def _app(process: Process) -> Json:
    return {
        "pid": process.pid,
        "exe": process.executable.path if process.executable else "",
        "user": process.uid,
    }


def _key(source: str, destination: str) -> bytes:
    """The four-tuple of a flow written as "ADDR:PORT" or "[ADDR]:PORT" at both ends.

    Raises:
        TunsplitError: it is no such flow.
    """
    ends = []
    for text in (source, destination):
        address, _, port = text.rpartition(":")
        try:
            ends.append((ip_address(address.strip("[]")), int(port).to_bytes(2, "big")))
        except (ValueError, OverflowError):
            raise TunsplitError(f"found {text!r}, expected ADDR:PORT or [ADDR]:PORT") from None
    (source_ip, source_port), (destination_ip, destination_port) = ends
    if source_ip.version != destination_ip.version:
        raise TunsplitError("source and destination are of different IP versions")
    return source_ip.packed + destination_ip.packed + source_port + destination_port
