"""Servers that tell a client which address they saw it by.

They run in our own process, with sockets that belong to a namespace: nothing is left to end when we do.

TCP echo (port 7): one line `ADDR PORT`, then whatever is sent. UDP echo (port 7): the same line, followed by
the datagram. HTTP (port 80): `/` is the address, `/bytes/N` that many octets.

Observers read in the same process, so under load a server gets its turn late. What was sent to it meanwhile waits in
its buffer, and is answered at one go: else an app that sends without an end would fill the buffer, and another app's
only datagram would be lost there (UdpRcvbufErrors in /proc/net/snmp).
"""

import socket
from collections.abc import Iterable

import trio

from tunsplit.lab.addresses import ECHO_PORT, HTTP_PORT, Address
from tunsplit.lab.netns import Namespace

BLOCK = bytes(65536)
LONGEST_REQUEST = 8192  # octets of an HTTP request's head
QUEUE = 8 << 20  # octets of datagrams that wait
BATCH = 256  # datagrams between two looks at other tasks
SO_RCVBUFFORCE = 33  # asm-generic/socket.h


def serve(namespace: Namespace, own: Iterable[Address], nursery: trio.Nursery) -> None:
    """Start all servers on each of these addresses of a namespace."""
    for address in own:
        family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
        for handler, port in ((echo_stream, ECHO_PORT), (answer_http, HTTP_PORT)):
            listener = _bind(namespace, family, socket.SOCK_STREAM, address, port)
            listener.listen(1024)
            nursery.start_soon(trio.serve_listeners, handler, [trio.SocketListener(_wrap(listener))])
        datagrams = _bind(namespace, family, socket.SOCK_DGRAM, address, ECHO_PORT)
        datagrams.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE)
        datagrams.setblocking(False)
        nursery.start_soon(echo_datagrams, datagrams)


async def echo_stream(stream: trio.SocketStream) -> None:
    """Say who is seen, then echo, until the client has sent all."""
    try:
        await stream.send_all(_describe(_peer(stream)))
        async for data in stream:
            await stream.send_all(data)
    except trio.BrokenResourceError:
        return  # a client may go at any time
    finally:
        await stream.aclose()


async def echo_datagrams(own: socket.socket) -> None:
    """Answer each datagram with who is seen, and the datagram; `own` does not block."""
    with own:
        while True:
            await trio.lowlevel.wait_readable(own)
            for _ in range(BATCH):
                try:
                    data, sender = own.recvfrom(65536)
                except BlockingIOError:
                    break
                try:
                    own.sendto(_describe(sender) + data, sender)
                except OSError:
                    continue  # no way back to that sender, or too long with its line: lost, as datagrams are


async def answer_http(stream: trio.SocketStream) -> None:
    """Answer one request, and close (RFC 9112 §9.6)."""
    try:
        head = b""
        while b"\r\n\r\n" not in head and len(head) < LONGEST_REQUEST:
            if not (data := await stream.receive_some()):
                return
            head += data
        words = head.split(b"\r\n", 1)[0].split()
        path = words[1] if len(words) == 3 else b""
        if path == b"/":
            body = _peer(stream)[0].encode() + b"\n"
            await _send_head(stream, b"200 OK", len(body))
            await stream.send_all(body)
        elif path.startswith(b"/bytes/") and path[7:].isdigit():
            await _send_head(stream, b"200 OK", left := int(path[7:]))
            while left:
                await stream.send_all(BLOCK[:left])
                left -= min(left, len(BLOCK))
        else:
            await _send_head(stream, b"404 Not Found", 0)
    except trio.BrokenResourceError:
        return
    finally:
        await stream.aclose()


async def _send_head(stream: trio.SocketStream, status: bytes, length: int) -> None:
    await stream.send_all(
        b"HTTP/1.1 %b\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nConnection: close\r\n\r\n" % (status, length)
    )


def _peer(stream: trio.SocketStream) -> tuple[str, int]:
    try:
        peer: tuple[str, int] = stream.socket.getpeername()[:2]
    except OSError as error:  # reset before we got our turn
        raise trio.BrokenResourceError from error
    return peer


def _describe(peer: tuple[str, int]) -> bytes:
    return f"{peer[0]} {peer[1]}\n".encode()


def _bind(namespace: Namespace, family: int, kind: int, address: Address, port: int) -> socket.socket:
    made = namespace.socket(family, kind)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, kind == socket.SOCK_STREAM)
        made.bind((str(address), port))
    except OSError:
        made.close()
        raise
    return made


def _wrap(made: socket.socket) -> trio.socket.SocketType:
    return trio.socket.from_stdlib_socket(made)
