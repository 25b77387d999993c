"""What `tunsplit status` and `tunsplit flows` show: the daemon's state as plain data (the contract's shapes)."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from ipaddress import ip_address

import trio

from tunsplit.engine.direction import destination_of, source_of
from tunsplit.engine.flow import App, Flow
from tunsplit.engine.nat import Nat
from tunsplit.host import FAMILIES
from tunsplit.kernel.conntrack import shortage
from tunsplit.tasks.admit import Admit
from tunsplit.tasks.control import Request
from tunsplit.tasks.dns import Dns
from tunsplit.tasks.forward import Forward
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.linksockets import LinkSockets
from tunsplit.tasks.network import Network
from tunsplit.tasks.portchoice import PortChoice
from tunsplit.tasks.refusals import Refusal
from tunsplit.tasks.switch import Switch
from tunsplit.tasks.tuns import Tuns
from tunsplit.wire.ip import protocol_name

Json = dict[str, object]


class Report:
    """Answers the verbs of the control socket. Reads only."""

    def __init__(
        self,
        switch: Switch,
        judge: Judge,
        nat: Nat,
        network: Network,
        admit: Admit,
        forward: Forward,
        ports: PortChoice,
        tuns: Tuns,
        dns: Dns,
        link_sockets: LinkSockets,
        counters: Counter[str],
    ) -> None:
        self._switch = switch
        self._judge = judge
        self._nat = nat
        self._network = network
        self._admit = admit
        self._forward = forward
        self._ports = ports
        self._tuns = tuns
        self._dns = dns
        self._link_sockets = link_sockets
        self._counters = counters

    def verbs(self) -> Mapping[str, Callable[[Request], object]]:
        """What can be asked, by verb."""
        return {"status": self.status, "flows": self.flows, "dns": self.dns}

    def status(self, request: Request | None = None) -> Json:
        """The daemon as a whole; None: whoever asks may see all."""
        network, config, policy = self._network, self._switch.config, self._judge.policy
        failure = network.failure or self._judge.failure
        sides = network.sides
        uplinks = {family: sides.uplink(family) for family in FAMILIES}
        uplink_addresses = dict.fromkeys(str(one) for facts in sides.uplinks for one in facts.addresses)

        def may_see(app: App | None) -> bool:
            return request is None or request.credentials.may_see(app.uid if app else None)

        state = "blocked" if failure else "active" if policy.enabled else "disabled"
        return {
            "state": state,
            "failure": failure,
            "tunnel": {
                "interface": config.tunnel.interface,
                "up": network.tunnel_up,
                "addresses": [str(one) for one in sides.tunnel.addresses] if sides.tunnel else [],
                "mtu": sides.tunnel.mtu if sides.tunnel else None,
            },
            "uplink": {
                **{f"interface{family}": facts.link.name if facts else None for family, facts in uplinks.items()},
                "addresses": list(uplink_addresses),
                **{
                    f"gateway{family}": _text(facts.gateway(family)) if facts else None
                    for family, facts in uplinks.items()
                },
            },
            "dns": {"platform": config.dns.platform, "setting": self._dns.setting(), "routes": self._dns.routes()},
            "split": {"enabled": policy.enabled, "mode": policy.mode.value},
            "hints": [*self._switch.hints(), *filter(None, [shortage()])],
            "link_sockets": [
                {"kind": one.kind, "interface": one.interface, "app": _app(one.app if may_see(one.app) else None)}
                for one in self._link_sockets.listed()
            ],
            "counters": self.counters(),
        }

    def counters(self) -> dict[str, int]:
        """All counters, and the sizes of all that grows."""
        devices: Counter[str] = Counter()
        for device in self._network.devices.all():
            devices.update({f"{device.side}_{name}": count for name, count in device.statistics().items()})
        return {
            **self._nat.statistics(),
            **self._admit.statistics(),
            **self._forward.counters,
            **self._ports.counters,
            **self._judge.statistics(),
            **self._counters,
            **self._dns.statistics(),
            **devices,
            "tun_write_dropped": sum(tun.dropped for tun in self._tuns),
            "tun_renewals": sum(tun.renewals for tun in self._tuns),
        }

    def flows(self, request: Request) -> Iterator[Json]:
        """Every flow that the asker may see, open ones first, then those refused of late."""
        now = trio.current_time()
        for flow in self._nat:
            if request.credentials.may_see(flow.app.uid if flow.app else None):
                yield {**_flow(flow, now), "captured": self._dns.capture.has_captured(flow)}
        for refusal in (*self._admit.refused.values(), *self._forward.refused.values()):
            if request.credentials.may_see(refusal.app.uid if refusal.app else None):
                yield _refusal(refusal, now)

    def dns(self, request: Request) -> Iterator[Json]:
        """The latest questions of the apps that the asker may see, oldest first."""
        for one in self._dns.recent():
            if request.credentials.may_see(one.app.uid if one.app else None):
                yield {**asdict(one), "app": _app(one.app)}


def _flow(flow: Flow, now: float) -> Json:
    return {
        **_ends(flow.protocol, flow.key),
        "nat": _end(source_of(flow.outside), flow.outside[-4:-2]) if flow.translated else None,
        "verdict": flow.side,
        "state": flow.state.value,
        "reason": flow.reason,
        "attribution": flow.attribution,
        "app": _app(flow.app),
        "packets_out": flow.original.packets,
        "bytes_out": flow.original.octets,
        "packets_in": flow.reply.packets,
        "bytes_in": flow.reply.octets,
        "age_s": round(now - flow.opened, 3),
    }


def _refusal(refusal: Refusal, now: float) -> Json:
    return {
        **_ends(refusal.protocol, refusal.key),
        "nat": None,
        "verdict": "block",
        "state": "refused",
        "reason": refusal.reason,
        "attribution": refusal.attribution,
        "app": _app(refusal.app),
        "packets_out": 0,
        "bytes_out": 0,
        "packets_in": 0,
        "bytes_in": 0,
        "age_s": round(now - refusal.since, 3),
        "captured": False,
    }


def _ends(protocol: int, key: bytes) -> Json:
    return {
        "protocol": protocol_name(protocol),
        "source": _end(source_of(key), key[-4:-2]),
        "destination": _end(destination_of(key), key[-2:]),
    }


def _end(address: bytes, port: bytes) -> str:
    text, number = ip_address(address), int.from_bytes(port, "big")
    return f"{text}:{number}" if text.version == 4 else f"[{text}]:{number}"


def _app(app: App | None) -> Json | None:
    return {"pid": app.pid, "exe": app.exe, "user": app.uid} if app else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)
