"""Ping and raw sockets, which sock_diag does not find by what they send: /proc/net/icmp, raw and their IPv6 twins.

And those below IP, packet and XDP sockets: /proc/net/packet and protocols.

Some facts about these tables (net/ipv4/ping.c ping_v4_format_sock, net/ipv4/raw.c raw_sock_seq_show,
net/ipv6/datagram.c __ip6_dgram_sock_seq_show, net/packet/af_packet.c packet_seq_show, net/core/sock.c
proto_seq_printf):

The columns are those of /proc/net/udp. The local "port" is a ping socket's echo identifier and a raw
socket's protocol. Addresses are 32-bit words printed as the host's own numbers: their bytes are turned
round on little-endian hosts. XDP sockets have no table, and sock_diag tells of them only where it was built to, but how
many there are is told with all protocols. /proc/net is a link into the process's main thread; /proc/thread-self/net
shows the namespace of the thread that reads.
"""

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from tunsplit.errors import KernelError

TABLES = Path("/proc/thread-self/net")
PIECE = 1 << 16  # bytes read at once; the kernel gives a page, or one row more
SUFFIX = {4: "", 6: "6"}

Row = TypeVar("Row")


class TableSocket(NamedTuple):
    """One row: addresses packed, all zero where the socket is not bound or connected."""

    inode: int
    uid: int
    number: int  # a ping socket's echo identifier, a raw socket's protocol
    local: bytes
    remote: bytes


class PacketSocket(NamedTuple):
    """One row of /proc/net/packet: `interface` is the index of the device that it is bound to, or 0."""

    inode: int
    interface: int


def ping_sockets(version: int) -> list[TableSocket]:
    """Every ping socket.

    Raises:
        KernelError: that cannot be known.
    """
    return parse_table(_read("icmp" + SUFFIX[version]))


def raw_sockets(version: int) -> list[TableSocket]:
    """Every raw socket.

    Raises:
        KernelError: that cannot be known.
    """
    return parse_table(_read("raw" + SUFFIX[version]))


def packet_sockets() -> list[PacketSocket]:
    """Every packet socket.

    Raises:
        KernelError: that cannot be known.
    """
    return parse_packet_table(_read("packet"))


def count_xdp_sockets() -> int:
    """How many XDP sockets there are.

    Raises:
        KernelError: that cannot be known.
    """
    return parse_protocols(_read("protocols")).get("XDP", 0)


def find_ping(rows: Iterable[TableSocket], identifier: int, source: bytes) -> list[TableSocket]:
    """Those of the ping sockets that send requests of this identifier from this address; with SO_REUSEADDR several."""
    return [row for row in rows if row.number == identifier and row.local in (source, bytes(len(source)))]


def find_raw(rows: Iterable[TableSocket], protocol: int, source: bytes, destination: bytes) -> list[TableSocket]:
    """Those of the raw sockets that are of this protocol and may send from `source` to `destination`."""
    anywhere = bytes(len(source))
    return [
        row
        for row in rows
        if row.number == protocol and row.local in (source, anywhere) and row.remote in (destination, anywhere)
    ]


def parse_table(text: str) -> list[TableSocket]:
    """Read a table of /proc/net.

    Raises:
        KernelError: a row is not what this kernel interface has been since Linux 2.6.
    """
    return _rows("/proc/net", text, _table_socket)


def parse_packet_table(text: str) -> list[PacketSocket]:
    """Read /proc/net/packet.

    Raises:
        KernelError: a row is not what this kernel interface has been since Linux 2.6.
    """
    return _rows("/proc/net/packet", text, lambda fields: PacketSocket(int(fields[8]), int(fields[4])))


def parse_protocols(text: str) -> dict[str, int]:
    """Read /proc/net/protocols: how many sockets there are of each; a module may count none (-1).

    Raises:
        KernelError: a row is not what this kernel interface has been since Linux 2.6.
    """
    return dict(_rows("/proc/net/protocols", text, lambda fields: (fields[0], max(0, int(fields[2])))))


def _rows(what: str, text: str, read: Callable[[list[str]], Row]) -> list[Row]:
    """Every row but the heading, by what `read` makes of its fields."""
    rows = []
    for line in text.splitlines()[1:]:
        try:
            rows.append(read(line.split()))
        except (IndexError, ValueError, OverflowError) as error:
            raise KernelError(f"{what}: unknown row {line!r}") from error
    return rows


def _table_socket(fields: list[str]) -> TableSocket:
    local, number = fields[1].split(":")
    remote, _ = fields[2].split(":")
    return TableSocket(int(fields[9]), int(fields[7]), int(number, 16), _address(local), _address(remote))


def _address(text: str) -> bytes:
    if len(text) not in (8, 32):
        raise ValueError(text)
    return b"".join(int(text[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(text), 8))


def _read(name: str) -> str:
    # Not by pathlib, nor with a decoder: what there is of raw sockets is asked for with each new UDP flow.
    pieces = []
    try:
        table = os.open(f"{TABLES}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            while piece := os.read(table, PIECE):
                pieces.append(piece)
        finally:
            os.close(table)
    except FileNotFoundError:  # no IPv6 in this kernel, or no ping sockets: there is no such socket
        return ""
    except OSError as error:
        raise KernelError(f"/proc/net/{name}: {error.strerror}") from error
    return b"".join(pieces).decode("ascii")
