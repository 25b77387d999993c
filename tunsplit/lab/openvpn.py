"""An OpenVPN between host and relay, for what WireGuard does not do: a client that is a program.

It looks its server's name up, connects, makes the tunnel's device, drops its privileges, and does part of that again
when it is told to reconnect (SIGUSR1).

Some facts about OpenVPN (openvpn(8), 2.6)
- The certificates may sign themselves: `peer-fingerprint` names the other end's.
- With `persist-tun` the device stays while the client looks for its server again; without it, the client needs root for
  making another.
- `mark` needs CAP_NET_ADMIN at each new socket.
- A client that is told to reconnect waits a second first (`connect-retry`).
"""

import hashlib
import ssl
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

from tunsplit.lab import programs
from tunsplit.lab.addresses import Address
from tunsplit.lab.lab import Lab
from tunsplit.lab.netns import Namespace
from tunsplit.lab.programs import Program

PORT = 1194
HOST_DEVICE, RELAY_DEVICE = "tun0", "ovpn0"
NETWORK4, NETWORK6 = "10.65.0.0", "fd65::/64"
# What every client gets, or one that reconnects would get other addresses, and need another device.
PUSHED = "ifconfig-push 10.65.0.2 255.255.255.0\nifconfig-ipv6-push fd65::2/64 fd65::1\n"
CONNECTED = "Initialization Sequence Completed"
# Files of the machine's own are shared by all namespaces: the client gets a resolv.conf of its own.
WITH_RESOLV_CONF = 'mount --bind "$1" /etc/resolv.conf; shift; exec "$@"'


class Certificate:
    """A key with a certificate that it has signed itself."""

    def __init__(self, directory: Path, name: str) -> None:
        self.key, self.certificate = directory / f"{name}.key", directory / f"{name}.pem"
        programs.execute([
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-days", "2", "-subj", f"/CN={name}", "-keyout", str(self.key), "-out", str(self.certificate),
        ])  # fmt: skip
        digest = hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.certificate.read_text())).hexdigest().upper()
        self.fingerprint = ":".join(digest[at : at + 2] for at in range(0, len(digest), 2))

    def options(self, peer: "Certificate") -> list[str]:
        """What tells OpenVPN who it is, and who the other end."""
        return [
            "--cert", str(self.certificate), "--key", str(self.key), "--peer-fingerprint", peer.fingerprint,
            "--verb", "3", "--auth-nocache",
        ]  # fmt: skip


class OpenVpn:
    """A server that runs in the relay, and the clients that it knows."""

    def __init__(self, lab: Lab, client: Certificate, server: Certificate, program: Program) -> None:
        self.program = program
        self._lab = lab
        self._client, self._server = client, server

    @asynccontextmanager
    async def client(
        self, remote: str, *options: str, port: int = PORT, resolver: Address | None = None
    ) -> AsyncGenerator[Program]:
        """Run a client in the host beside the block; it need not have connected.

        Args:
            remote: the server's address, or its name.
            options: more of its options, as on its command line.
            port: where the server is reached.
            resolver: what its resolv.conf names.
        """
        command = [
            programs.require("openvpn"), "--client", "--nobind", "--dev", HOST_DEVICE, "--dev-type", "tun",
            "--proto", "udp", "--remote", remote, str(port), "--route-nopull",
            "--connect-retry", "1", "1", *self._client.options(self._server), *options,
        ]  # fmt: skip
        if resolver is not None:
            file = self._lab.directory / "openvpn-resolv.conf"
            file.write_text(f"nameserver {resolver}\noptions timeout:1 attempts:2\n")
            command = ["unshare", "--mount", "sh", "-c", WITH_RESOLV_CONF, "sh", str(file), *command]
        async with self._lab.host.start(command) as program:
            yield program


@asynccontextmanager
async def serve_openvpn(lab: Lab) -> AsyncGenerator[OpenVpn]:
    """Run a server in the relay beside the block; it masquerades what comes out of its tunnel.

    It is reached on port 53 as well, where the relay's resolver is on other addresses.
    """
    server, client = Certificate(lab.directory, "server"), Certificate(lab.directory, "client")
    _translate(lab.relay)
    clients = lab.directory / "openvpn-clients"
    clients.mkdir()
    (clients / "DEFAULT").write_text(PUSHED)
    command = [
        "openvpn", "--dev", RELAY_DEVICE, "--dev-type", "tun", "--proto", "udp6", "--port", str(PORT),
        "--server", NETWORK4, "255.255.255.0", "--topology", "subnet", "--server-ipv6", NETWORK6, "--dh", "none",
        "--keepalive", "1", "5", "--client-config-dir", str(clients), *server.options(client),
    ]  # fmt: skip
    async with lab.relay.start(command) as program:
        await program.wait_written(CONNECTED)
        yield OpenVpn(lab, client, server, program)


def _translate(relay: Namespace) -> None:
    relay.nft(
        f"""
        table inet openvpn {{
            chain prerouting {{
                type nat hook prerouting priority dstnat;
                iifname eth0 udp dport 53 redirect to :{PORT}
            }}
            chain postrouting {{
                type nat hook postrouting priority srcnat;
                ip saddr {NETWORK4}/24 oifname eth0 masquerade
                ip6 saddr {NETWORK6} oifname eth0 masquerade
            }}
        }}
        """
    )
