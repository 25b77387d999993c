"""A client of the lab's servers: says which address it was seen by.

Run as a program, by a copied interpreter: `client.py tcp|udp|icmp|hold ADDRESS`. It imports nothing of ours.
"""

import os
import socket
import sys

PATIENCE_S = 3
PORT = 7


def connect(kind: int, address: str, protocol: int = 0) -> socket.socket:
    """A socket of the address' family, connected, whose operations end in good time."""
    own = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind, protocol)
    own.settimeout(PATIENCE_S)
    own.connect((address, PORT))
    return own


def say(text: str) -> None:
    """A line on stdout, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def ask_tcp(address: str) -> str:
    """What a TCP server says."""
    with connect(socket.SOCK_STREAM, address) as own:
        return own.makefile().readline().split()[0]


def ask_udp(address: str) -> str:
    """What a UDP server says."""
    with connect(socket.SOCK_DGRAM, address) as own:
        own.send(b"?")
        return own.recv(2048).decode().split()[0]


def ask_icmp(address: str) -> str:
    """Nothing: an echo does not tell. Ends when it is answered."""
    version6 = ":" in address
    with connect(socket.SOCK_DGRAM, address, socket.IPPROTO_ICMPV6 if version6 else socket.IPPROTO_ICMP) as own:
        own.send(bytes((128 if version6 else 8,)) + bytes(7) + b"tunsplit")
        own.recv(2048)
    return ""


def hold_tcp(address: str) -> str:
    """Keep a connection open until stdin ends."""
    with connect(socket.SOCK_STREAM, address) as own:
        seen = own.makefile().readline().split()[0]
        say(seen)
        sys.stdin.read()
    return ""


ASK = {"tcp": ask_tcp, "udp": ask_udp, "icmp": ask_icmp, "hold": hold_tcp}

if __name__ == "__main__":
    try:
        answer = ASK[sys.argv[1]](sys.argv[2])
    except OSError as error:
        sys.exit(os.strerror(error.errno) if error.errno else str(error))
    if answer:
        say(answer)
