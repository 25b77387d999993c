"""An app under test: runs the Python it is told on stdin, line by line, and answers on stdout.

A copied interpreter runs it, so that it is an app of its own. It imports nothing of ours.
"""

import contextlib
import errno
import json
import os
import select
import socket
import struct
import subprocess
import sys
import time
import traceback

__all__ = ["contextlib", "errno", "os", "select", "struct", "subprocess", "time"]  # for the code that comes

PATIENCE_S = 3.0
ECHO_PORT = 7


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def tcp(address: str, port: int = ECHO_PORT, source: str = "", source_port: int = 0) -> socket.socket:
    """A connection, from this source if one is given."""
    own = socket.socket(family(address), socket.SOCK_STREAM)
    own.bind((source, source_port))
    own.connect((address, port))
    return own


def udp(address: str, port: int = ECHO_PORT, source: str = "", source_port: int = 0) -> socket.socket:
    """A connected UDP socket."""
    own = socket.socket(family(address), socket.SOCK_DGRAM)
    own.bind((source, source_port))
    own.connect((address, port))
    return own


def ping(address: str) -> socket.socket:
    """A connected ping socket."""
    kind = socket.IPPROTO_ICMPV6 if ":" in address else socket.IPPROTO_ICMP
    own = socket.socket(family(address), socket.SOCK_DGRAM, kind)
    own.connect((address, 0))
    return own


def echo(own: socket.socket, payload: bytes = b"tunsplit", sequence: int = 1) -> bytes:
    """Send an echo request on a ping socket; the payload of the answer."""
    kind = 128 if own.family == socket.AF_INET6 else 8
    own.send(struct.pack("!BBHHH", kind, 0, 0, 0, sequence) + payload)
    return own.recv(65536)[8:]


def read_line(own: socket.socket) -> str:
    """The line with which the echo server begins."""
    line = b""
    while not line.endswith(b"\n"):
        if not (octet := own.recv(1)):
            raise ConnectionError("closed within the line")
        line += octet
    return line.decode().strip()


def read_exactly(own: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        if not (part := own.recv(size - len(data))):
            raise ConnectionError(f"closed after {len(data)} of {size} octets")
        data += part
    return bytes(data)


def ask(protocol: str, address: str, payload: bytes = b"?") -> str:
    """The address that the server saw; of an echo, which does not tell, nothing."""
    if protocol == "tcp":
        with tcp(address) as own:
            return read_line(own).split()[0]
    if protocol == "udp":
        with udp(address) as own:
            own.send(payload)
            line, rest = own.recv(65536).split(b"\n", 1)
            assert rest == payload, f"{len(rest)} octets came back of {len(payload)}"
            return line.split()[0].decode()
    with ping(address) as own:
        assert echo(own, payload) == payload
        return ""


def run() -> None:
    socket.setdefaulttimeout(PATIENCE_S)
    names = dict(globals())
    for line in sys.stdin:
        told = json.loads(line)
        names.update(told["names"])
        try:
            try:
                code = compile(told["code"], "<told>", "eval")
            except SyntaxError:
                exec(compile(told["code"], "<told>", "exec"), names)
                answer: dict[str, object] = {"value": "None"}
            else:
                value = eval(code, names)
                answer = {"value": repr(value if isinstance(value, BUILTIN) else None)}
        except OSError as error:
            answer = {"error": [error.errno or (errno.ETIMEDOUT if isinstance(error, TimeoutError) else 0), str(error)]}
        except Exception:  # it goes to the test, which raises it again
            answer = {"failure": traceback.format_exc()}
        sys.stdout.write(f"{json.dumps(answer)}\n#{told['number']}\n")
        sys.stdout.flush()


BUILTIN = (bool, int, float, str, bytes, list, tuple, dict, set)

if __name__ == "__main__":
    run()
