"""A throw-away network with a host to run tunsplit in, and observers on both of its sides.

Example:
    async with open_lab() as lab:
        curl = lab.copy_program("curl", "excluded-curl")
        async with lab.tunsplit(excluded=[curl]):
            await lab.host.run([curl, lab.url(4)])
        await lab.uplink.settle()
        assert lab.uplink.seen("tcp", address=lab.server(4))
"""

import itertools
import signal
import tomllib
from collections.abc import AsyncGenerator, Collection, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import trio

from tunsplit.lab import (
    addresses,
    configuration,
    copies,
    daemon,
    leases,
    oddresolver,
    programs,
    resolvers,
    servers,
    topology,
)
from tunsplit.lab.addresses import TUNNEL_DEVICE, TUNNEL_PORT, Address, format_host
from tunsplit.lab.leases import Lease
from tunsplit.lab.netns import Namespace
from tunsplit.lab.observer import Observer
from tunsplit.lab.signals import unwind_first
from tunsplit.lab.wireguard import Kind, Tunnel, find_kind

BOTH = (4, 6)


class Lab:
    """A network as `open_lab` makes it.

    Attributes:
        name: prefix of its namespaces' names.
        directory: its own; gone when it closes.
        host, router, relay, internet: its namespaces.
        uplink: observes the wire between host and router.
        tunnel: observes what comes out of the tunnel at the relay.
        resolvers: by role: relay (in the tunnel), lan (private, on the uplink's network), public (on the internet),
            system (on the uplink's network).
    """

    def __init__(self, lease: Lease, network: topology.Network, tunnel: Tunnel, captures: Path | None) -> None:
        self.name = lease.name
        self.directory = lease.directory
        self.host, self.router = network.host, network.router
        self.relay, self.internet = network.relay, network.internet
        self.uplink = Observer(
            "uplink",
            (self.router, "lan0"),
            find_sender=lambda: (self.host, "eth0"),
            dump=captures and captures / "uplink.pcapng",
        )
        self.tunnel = Observer(
            "tunnel",
            (self.relay, TUNNEL_DEVICE),
            find_sender=lambda: (self.host, TUNNEL_DEVICE) if tunnel.host.up else None,
            dump=captures and captures / "tunnel.pcapng",
        )
        self.resolvers: dict[str, resolvers.Resolver] = {}
        self._tunnel = tunnel
        self._runs = 0
        self._odd_hosts = itertools.count(100)  # of the addresses of odd resolvers, the last part

    @property
    def tunnel_kind(self) -> Kind:
        """What the tunnel is made of: `wireguard` (the kernel's), `wireguard-go`, or a bare `veth`."""
        return self._tunnel.kind

    @property
    def has_relay_end(self) -> bool:
        """The relay's end of the tunnel exists: WireGuard's always, a veth pair's as long as the host's does."""
        return self._tunnel.relay.present

    def server(self, version: int) -> Address:
        """The internet's server: TCP and UDP echo on port 7, HTTP on port 80."""
        return addresses.SERVER[version].ip

    def url(self, version: int, path: str = "/") -> str:
        """Where the internet's HTTP server has this; `/` is the address that it sees."""
        return f"http://{format_host(self.server(version))}{path}"

    def seen_from_uplink(self, version: int) -> Address:
        """The address that a server sees when a packet came by the uplink."""
        return addresses.HOST[version].ip

    def seen_from_tunnel(self, version: int) -> Address:
        """The address that a server sees when a packet came by the tunnel."""
        # Without a relay's NAT a veth would show the tunnel's own address; ours masquerades whatever the kind.
        return addresses.RELAY[version].ip

    def copy_program(self, program: str, name: str) -> Path:
        """A copy of an executable, `python` for ours, so that it has a path and an inode of its own."""
        directory = self.directory / "bin"
        directory.mkdir(exist_ok=True)
        return copies.copy_program(program, directory / name)

    # The tunnel, as a VPN client would bring it up and take it down

    def tunnel_up(self) -> None:
        """Bring the tunnel's device up, with its addresses."""
        self._tunnel.host.bring_up()

    def tunnel_down(self) -> None:
        """Bring the tunnel's device down."""
        self._tunnel.host.bring_down()

    async def create_tunnel(self) -> None:
        """Make the tunnel's device in the host, and bring it up."""
        await self._tunnel.create_host()
        if self.tunnel_kind == "veth":
            self.tunnel.attach()

    async def remove_tunnel(self) -> None:
        """Remove the tunnel's device from the host."""
        if self.tunnel_kind == "veth":
            self.tunnel.detach()
        await self._tunnel.remove_host()

    async def kill_tunnel(self) -> None:
        """End the tunnel's client as a crash does; its device goes with it. `create_tunnel` starts another."""
        if self.tunnel_kind == "veth":
            self.tunnel.detach()
        await self._tunnel.kill_host()

    # tunsplit

    def config(self, excluded: Iterable[str | Path] = (), **overrides: configuration.Section) -> str:
        """A configuration for this lab, as TOML.

        Args:
            excluded: paths of `[[app]]` entries.
            overrides: sections by name, whose keys go before the lab's own: `split={"mode": "include"}`.
        """
        sections: dict[str, configuration.Section] = {
            "tunnel": {
                "interface": TUNNEL_DEVICE,
                "fwmark": addresses.TUNNEL_MARK,
                "endpoint": [f"{self._tunnel.endpoint}/udp"],
                "dns": [str(addresses.RELAY_RESOLVER[4])],
            },
            "control": {"socket": str(self.directory / "tunsplit.sock")},
            "log": {"level": "debug"},
        }
        return configuration.render(sections, overrides, excluded)

    def write_config(self, config: str) -> tuple[Path, Path]:
        """Write a configuration to a file; give the file's path, and the path of the control socket it names."""
        self._runs += 1
        path = self.directory / f"tunsplit-{self._runs}.toml"
        path.write_text(config)
        control = tomllib.loads(config).get("control", {})
        return path, Path(control.get("socket", "/run/tunsplit/tunsplit.sock"))

    def rewrite_config(self, config: str) -> None:
        """Edit the file that was written last, for a reload."""
        (self.directory / f"tunsplit-{self._runs}.toml").write_text(config)

    def tunsplit(
        self, config: str | None = None, *, excluded: Iterable[str | Path] = ()
    ) -> AbstractAsyncContextManager[daemon.Daemon]:
        """Run tunsplit in the host beside the block, with this configuration or with `config(excluded)`."""
        return daemon.start(self.host, *self.write_config(self.config(excluded) if config is None else config))

    # More of a network

    @asynccontextmanager
    async def iperf_server(
        self, namespace: Namespace | None = None, port: int = addresses.IPERF_PORT
    ) -> AsyncGenerator[programs.Program]:
        """An iperf3 server beside the block, in the internet if nowhere else."""
        async with (namespace or self.internet).start(["iperf3", "-s", "-p", str(port), "--forceflush"]) as program:
            await program.wait_written("Server listening")
            yield program

    @asynccontextmanager
    async def odd_resolver(
        self, role: str, behaviour: oddresolver.Behaviour, *, version: int = 4, delay_s: float = 0.5
    ) -> AsyncGenerator[oddresolver.OddResolver]:
        """A resolver that misbehaves, beside the block.

        Args:
            role: relay, lan or public: where it is.
            behaviour: see `tunsplit.lab.oddresolver`.
            version: of its address.
            delay_s: how long a slow one takes.
        """
        namespace, device, network = {
            "relay": (self.relay, "lo", addresses.RELAY_TUNNEL),
            "lan": (self.router, "lan0", addresses.PRIVATE_LAN),
            "public": (self.internet, "eth0", addresses.SERVER),
        }[role]
        address = network[version].network[next(self._odd_hosts)]
        namespace.ip(f"address add {address} dev {device}{' nodad' if version == 6 else ''}")
        odd = oddresolver.OddResolver(namespace, address, behaviour, delay_s)
        async with programs.background() as nursery:
            await nursery.start(odd.serve)
            yield odd

    @asynccontextmanager
    async def observe(self, namespace: Namespace, device: str, **options: Any) -> AsyncGenerator[Observer]:
        """One more observer beside the block; options as for `Observer`."""
        observer = Observer(f"{namespace.name} {device}", (namespace, device), **options)
        observer.attach()
        try:
            async with programs.background() as nursery:
                nursery.start_soon(observer.watch)
                yield observer
        finally:
            observer.close()


@asynccontextmanager
async def open_lab(
    *,
    uplink: Collection[int] = BOTH,
    tunnel: Collection[int] | None = BOTH,
    tunnel_kind: Kind | None = None,
    tunnel_port: int = TUNNEL_PORT,
    ipv6: bool = True,
    rp_filter: int = 2,
    observe: bool = True,
    captures: Path | None = None,
) -> AsyncGenerator[Lab]:
    """A network that lasts as long as the block; the initial network namespace is not touched.

    Namespaces, processes and files are gone at the end, also after an exception, SIGINT, SIGTERM and SIGHUP;
    after SIGKILL the next lab sweeps them.

    Args:
        uplink: IP versions that the host has an address of on its uplink.
        tunnel: the same for the tunnel; None: there is no tunnel until `create_tunnel`, which then has both.
        tunnel_kind: make it of this, instead of the best there is.
        tunnel_port: where the relay takes the tunnel's transport.
        ipv6: False switches IPv6 off in the host.
        rp_filter: the host's reverse path filter: 0 off, 1 strict, 2 loose.
        observe: look at both sides; False leaves all of the CPU to a benchmark.
        captures: a directory for uplink.pcapng and tunnel.pcapng.

    Raises:
        PermissionMissing: we are not root.
        KernelError: a program is missing, or the kernel refuses.
    """
    programs.require_root()
    for program in ("ip", "nft", "nsenter", "unshare", "dnsmasq"):
        programs.require(program)
    leases.sweep()
    uplink = [version for version in uplink if ipv6 or version == 4]
    inside = [version for version in (BOTH if tunnel is None else tunnel) if ipv6 or version == 4]
    async with unwind_first(signal.SIGTERM, signal.SIGHUP):
        with leases.take() as lease:
            network = topology.build(lease.name, uplink=uplink, ipv6=ipv6, rp_filter=rp_filter)
            kind = tunnel_kind or find_kind(network.relay)
            transport = addresses.RELAY[4 if 4 in uplink else 6].ip
            async with programs.background() as nursery, AsyncExitStack() as stack:
                ends = Tunnel(
                    network.host,
                    network.relay,
                    kind=kind,
                    versions=inside,
                    endpoint=transport,
                    port=tunnel_port,
                    nursery=nursery,
                )
                lab = Lab(lease, network, ends, captures)
                await ends.create_relay()
                if tunnel is not None:
                    await ends.create_host()
                await _populate(lab, nursery, stack, log=observe)
                if observe:
                    _look(lab, nursery, stack)
                yield lab


async def _populate(lab: Lab, nursery: trio.Nursery, stack: AsyncExitStack, *, log: bool) -> None:
    """Start what answers in the lab."""
    servers.serve(lab.internet, [interface.ip for interface in addresses.SERVER.values()], nursery)
    servers.serve(lab.router, [interface.ip for interface in addresses.ROUTER_LAN.values()], nursery)
    places = {"relay": lab.relay, "lan": lab.router, "public": lab.internet, "system": lab.router}
    for role, namespace in places.items():
        running = resolvers.start(namespace, role, addresses.RESOLVERS[role].values(), log=log)
        lab.resolvers[role] = await stack.enter_async_context(running)


def _look(lab: Lab, nursery: trio.Nursery, stack: AsyncExitStack) -> None:
    """Start to observe both sides."""
    for observer in (lab.uplink, lab.tunnel):
        stack.callback(observer.close)
        if observer is lab.uplink or lab.has_relay_end:
            observer.attach()
        nursery.start_soon(observer.watch)
