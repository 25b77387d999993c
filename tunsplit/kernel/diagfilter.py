"""What a walk over the kernel's sockets is to tell of: those on one of many ports, by a small program in the request.

Some facts about such a program (net/ipv4/inet_diag.c, inet_diag_bc_run, inet_diag_bc_audit):

It runs for every socket of the walk. An operation says how far to go on when it is true, and how far when not, and
there is no way back. A socket is told when the program ends at its very end, and is not when it leaps over that by one
operation's head. Who follows the ways of what is true must come by every place that is jumped to.

A comparison takes 8 ns, so a search tree is what makes many ports cheap: 8 comparisons a socket for 256.
"""

from collections.abc import Sequence
from struct import Struct

INET_DIAG_REQ_BYTECODE = 1
INET_DIAG_BC_JMP, INET_DIAG_BC_S_GE, INET_DIAG_BC_S_EQ = 1, 2, 11
HEAD = 4  # octets of an operation; a comparison's port is a second one

MOST_PORTS = 256  # a way has 16 bits, and each port takes 20 octets

pack_attribute = Struct("=HH").pack  # nlattr: length · type
pack_operation = Struct("=BBH").pack  # inet_diag_bc_op: code · how far when true · how far when not


def filter_of(ports: Sequence[bytes]) -> bytes:
    """The attribute of a request that has the walk tell of sockets on these local ports alone.

    Args:
        ports: at least one, at most `MOST_PORTS`, each as two octets.
    """
    program = _search_tree(sorted(int.from_bytes(port, "big") for port in ports), 0)
    return pack_attribute(HEAD + len(program), INET_DIAG_REQ_BYTECODE) + program


def _search_tree(ports: Sequence[int], after: int) -> bytes:
    """Operations that look for a port among these, and leap over the end where it is none of them.

    Args:
        ports: upwards, at least one.
        after: how many octets of program follow these operations.
    """
    if len(ports) == 1:
        jump = pack_operation(INET_DIAG_BC_JMP, HEAD, HEAD + after)
        return _compare(INET_DIAG_BC_S_EQ, ports[0], 2 * HEAD + len(jump) + after + HEAD) + jump
    half = len(ports) // 2
    lower = _search_tree(ports[:half], after)
    upper = _search_tree(ports[half:], len(lower) + after)
    return _compare(INET_DIAG_BC_S_GE, ports[half], 2 * HEAD + len(upper)) + upper + lower


def _compare(code: int, port: int, otherwise: int) -> bytes:
    return pack_operation(code, 2 * HEAD, otherwise) + pack_operation(0, 0, port)
