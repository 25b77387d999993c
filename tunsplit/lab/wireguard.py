"""The tunnel between host and relay: WireGuard by the kernel, or by wireguard-go, or else a bare veth pair.

Some facts about WireGuard devices
- The kernel's belongs, with its UDP socket, to the namespace in which it was made (drivers/net/wireguard/device.c).
- wireguard-go is found through /run/wireguard/DEVICE.sock, and /run is the same in all network namespaces: so
  each of ours runs in a mount namespace with an empty /run, where two labs' wg0 do not meet.
- It ends by itself when its device is removed.
- A first handshake that finds no peer is repeated after 5 s: the relay's end is set up before the host's.
- A device that goes down loses its IPv6 addresses and its routes.
"""

from collections.abc import Iterable
from typing import Literal

import trio

from tunsplit.errors import KernelError
from tunsplit.lab import addresses, programs
from tunsplit.lab.addresses import TUNNEL_DEVICE, TUNNEL_PORT, Address, Interface
from tunsplit.lab.netns import Namespace

Kind = Literal["wireguard", "wireguard-go", "veth"]


def find_kind(relay: Namespace) -> Kind:
    """The best tunnel that this machine can make."""
    if programs.find_program("wg") is None:
        return "veth"
    try:
        relay.ip("link add probe type wireguard\nlink delete probe")
    except KernelError:
        return "veth" if programs.find_program("wireguard-go") is None else "wireguard-go"
    return "wireguard"


class End:
    """One end of the tunnel.

    Args:
        namespace: where it is.
        kind: what it is made of.
        own: its addresses.
        nursery: where wireguard-go runs.
    """

    def __init__(self, namespace: Namespace, kind: Kind, own: Iterable[Interface], nursery: trio.Nursery) -> None:
        self.namespace = namespace
        self.own = list(own)
        self.present = False
        self.up = False
        self._kind = kind
        self._nursery = nursery
        self._program: programs.Program | None = None

    async def create(self, interface: str, peer: str) -> None:
        """Make the device, with its keys and addresses, and bring it up.

        Args:
            interface: what `wg setconf` wants under [Interface].
            peer: and under [Peer].
        """
        if self._kind == "wireguard":
            self.namespace.ip(f"link add {TUNNEL_DEVICE} type wireguard")
        elif self._kind == "wireguard-go":
            self._program = await self._nursery.start(_run_wireguard_go, self.namespace)
        self.present = True
        self.namespace.ip(f"link set {TUNNEL_DEVICE} mtu {addresses.TUNNEL_MTU}")
        self.bring_up()
        if self._kind != "veth":
            self._wg(f"[Interface]\n{interface}\n[Peer]\n{peer}\n")

    def bring_up(self) -> None:
        """Bring the device up and give it its addresses, again if need be."""
        script = f"link set {TUNNEL_DEVICE} up\n"
        self.namespace.ip(script + "".join(f"address replace {own} dev {TUNNEL_DEVICE}\n" for own in self.own))
        self.up = True

    def bring_down(self) -> None:
        """Bring the device down: its addresses of IPv6 and its routes are gone."""
        self.namespace.ip(f"link set {TUNNEL_DEVICE} down")
        self.up = False

    async def remove(self) -> None:
        """Remove the device."""
        self.present = self.up = False
        self.namespace.ip(f"link delete {TUNNEL_DEVICE}")
        if self._program is not None:
            await self._program.process.wait()

    async def kill(self) -> None:
        """End the client as a crash does: its device goes with it. The kernel's own is removed."""
        if self._program is None:
            await self.remove()
            return
        self.present = self.up = False
        self._program.process.kill()
        await self._program.process.wait()

    def _wg(self, configuration: str) -> None:
        command = [programs.require("wg"), "setconf", TUNNEL_DEVICE, "/dev/stdin"]
        if self._program is None:
            programs.execute(self.namespace.command(command), text=configuration)
        else:
            enter = ["nsenter", f"--target={self._program.pid}", "--net", "--mount", "--"]
            programs.execute([*enter, *command], text=configuration)


class Tunnel:
    """Both ends. The relay's is made once; the host's comes and goes as a VPN client would have it."""

    def __init__(
        self,
        host: Namespace,
        relay: Namespace,
        *,
        kind: Kind,
        versions: Iterable[int],
        endpoint: Address,
        port: int = TUNNEL_PORT,
        nursery: trio.Nursery,
    ) -> None:
        self.kind = kind
        self.host = End(host, kind, (addresses.HOST_TUNNEL[version] for version in versions), nursery)
        self.relay = End(relay, kind, addresses.RELAY_TUNNEL.values(), nursery)
        self.endpoint = f"{addresses.format_host(endpoint)}:{port}"
        self._port = port
        self._keys = ("", "", "", "") if kind == "veth" else (*_make_keys(), *_make_keys())

    async def create_relay(self) -> None:
        """Make the relay's end, which masquerades what comes out of it; of a veth pair, only the latter."""
        if self.kind != "veth":
            _, host_public, relay_private, _ = self._keys
            # Its server may send into the tunnel whatever it likes, and what the host sends shows whatever it bears.
            await self.relay.create(
                f"PrivateKey = {relay_private}\nListenPort = {addresses.TUNNEL_PORT}",
                f"PublicKey = {host_public}\nAllowedIPs = 0.0.0.0/0, ::/0",
            )
        self.relay.namespace.nft(
            f"""
            table inet relay {{
                chain prerouting {{
                    type nat hook prerouting priority dstnat;
                    iifname eth0 udp dport {self._port} redirect to :{TUNNEL_PORT}
                }}
                chain postrouting {{
                    type nat hook postrouting priority srcnat
                    ip saddr {addresses.RELAY_TUNNEL[4].network} oifname eth0 masquerade
                    ip6 saddr {addresses.RELAY_TUNNEL[6].network} oifname eth0 masquerade
                }}
            }}
            """
        )

    async def create_host(self) -> None:
        """Make the host's end; of a veth pair, both.

        It has no route in main: that is how a client looks that leaves routing to tunsplit.
        """
        if self.kind == "veth":
            self._create_pair()
            await self.relay.create("", "")
        host_private, _, _, relay_public = self._keys
        await self.host.create(
            f"PrivateKey = {host_private}\nFwMark = {addresses.TUNNEL_MARK}",
            f"PublicKey = {relay_public}\nAllowedIPs = 0.0.0.0/0, ::/0\nEndpoint = {self.endpoint}",
        )

    async def remove_host(self) -> None:
        """Remove the host's end; of a veth pair, both."""
        await self.host.remove()
        if self.kind == "veth":
            self.relay.present = self.relay.up = False

    async def kill_host(self) -> None:
        """End the client of the host's end as a crash does; of a veth pair, remove both."""
        await self.host.kill()
        if self.kind == "veth":
            self.relay.present = self.relay.up = False

    def _create_pair(self) -> None:
        # With ARP off and one MAC at both ends, whatever is sent at one is received at the other,
        # without neighbours: as near to a layer 3 device as a veth comes.
        self.host.namespace.ip(
            f"""
            link add {TUNNEL_DEVICE} address 02:00:00:00:00:01 type veth \
                peer name {TUNNEL_DEVICE} address 02:00:00:00:00:01 netns {self.relay.namespace.name}
            link set {TUNNEL_DEVICE} arp off
            """
        )
        self.relay.namespace.ip(f"link set {TUNNEL_DEVICE} arp off")


async def _run_wireguard_go(namespace: Namespace, task_status: trio.TaskStatus[programs.Program]) -> None:
    daemon = programs.require("wireguard-go")
    script = f"mount -t tmpfs tunsplit-lab /run && LOG_LEVEL=verbose exec {daemon} --foreground {TUNNEL_DEVICE}"
    async with namespace.start(["unshare", "--mount", "--", "/bin/sh", "-c", script]) as program:
        await program.wait_written("UAPI listener started")
        task_status.started(program)
        await program.process.wait()


def _make_keys() -> tuple[str, str]:
    """A private key and its public one."""
    private = programs.execute(["wg", "genkey"])
    return private.strip(), programs.execute(["wg", "pubkey"], text=private).strip()
