"""A client of the lab's resolvers: says who answered.

Run as a program, by a copied interpreter: `dnsclient.py udp|tcp RESOLVER NAME [TYPE]`. It prints the addresses, or the
texts, that it was given; where there are none, the answer's code. It imports nothing of ours.
"""

import os
import secrets
import socket
import struct
import sys

PATIENCE_S = 8
PORT = 53
KINDS = {"A": 1, "TXT": 16, "AAAA": 28}  # RFC 1035 §3.2.2, RFC 3596 §2.1
CODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}  # RFC 1035 §4.1.1
TRUNCATED = 0x0200


def encode_name(name: str) -> bytes:
    """A name as it is on the wire, without compression (RFC 1035 §3.1)."""
    return b"".join(bytes((len(label),)) + label.encode() for label in name.split(".")) + b"\0"


def encode_question(number: int, name: str, kind: str = "A") -> bytes:
    """A question that wants recursion, with this ID."""
    return struct.pack("!6H", number, 0x0100, 1, 0, 0, 0) + encode_name(name) + struct.pack("!2H", KINDS[kind], 1)


def skip_name(message: bytes, at: int) -> int:
    """Where the name that begins here ends."""
    while message[at]:
        if message[at] >= 0xC0:  # a pointer is a name's last part (RFC 1035 §4.1.4)
            return at + 2
        at += message[at] + 1
    return at + 1


def read_answer(message: bytes) -> str:
    """What an answer comes to: addresses or texts; the code where there are none; TRUNCATED."""
    _, flags, questions, answers, _, _ = struct.unpack_from("!6H", message)
    if flags & TRUNCATED:
        return "TRUNCATED"
    at = 12
    for _ in range(questions):
        at = skip_name(message, at) + 4
    found = []
    for _ in range(answers):
        at = skip_name(message, at)
        kind, _, _, size = struct.unpack_from("!HHIH", message, at)
        data = message[at + 10 : at + 10 + size]
        at += 10 + size
        if kind in (KINDS["A"], KINDS["AAAA"]):
            found.append(socket.inet_ntop(socket.AF_INET if size == 4 else socket.AF_INET6, data))
        elif kind == KINDS["TXT"]:
            found.append(data[1 : 1 + data[0]].decode())
    return " ".join(found) or CODES[flags & 15]


def open_socket(kind: int, server: str, port: int = PORT) -> socket.socket:
    """A socket of the resolver's family, connected, whose operations end in good time."""
    own = socket.socket(socket.AF_INET6 if ":" in server else socket.AF_INET, kind)
    own.settimeout(PATIENCE_S)
    try:
        own.connect((server, port))
    except OSError:
        own.close()
        raise
    return own


def read_exactly(own: socket.socket, size: int) -> bytes:
    """So many octets of a stream."""
    data = b""
    while len(data) < size:
        if not (part := own.recv(size - len(data))):
            raise ConnectionError(f"closed after {len(data)} of {size} octets")
        data += part
    return data


def exchange(protocol: str, server: str, message: bytes, port: int = PORT) -> bytes:
    """Send a message to a resolver, and give what comes back with its ID."""
    if protocol == "tcp":
        with open_socket(socket.SOCK_STREAM, server, port) as own:
            own.sendall(struct.pack("!H", len(message)) + message)
            return read_exactly(own, struct.unpack("!H", read_exactly(own, 2))[0])
    with open_socket(socket.SOCK_DGRAM, server, port) as own:
        own.send(message)
        while (answer := own.recv(65536))[:2] != message[:2]:
            continue
        return answer


def ask_resolver(protocol: str, server: str, name: str, kind: str = "A", *, port: int = PORT) -> str:
    """Ask by `udp` or `tcp`; what the answer comes to, see `read_answer`."""
    return read_answer(exchange(protocol, server, encode_question(secrets.randbits(16), name, kind), port))


if __name__ == "__main__":
    try:
        text = ask_resolver(*sys.argv[1:5])
    except OSError as error:
        sys.exit(os.strerror(error.errno) if error.errno else str(error))
    sys.stdout.write(f"{text}\n")
