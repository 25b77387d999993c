"""Attribution: finding the process behind a flow.

Attribution is a list of sources asked in order, each answering an owner with its certainty, or nothing.
A source that sees further (a process noted for each datagram by a program in the kernel, a process tree
kept from events) is one more at the head of the list.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import NamedTuple, Protocol

from tunsplit.process import Process

Key = tuple[int, bytes]  # protocol, four-tuple


class Certainty(StrEnum):
    """How sure it is that the owner sent the flow."""

    EXACT = "exact"  # one socket fits, one process holds it
    SHARED = "shared"  # several sockets fit, or several processes hold it: any of them may be the sender
    INHERITED = "inherited"  # nobody has the socket yet: it will go to the holder of its listener
    AMBIGUOUS = "ambiguous"  # there may be holders that the source could not see
    GONE = "gone"  # there was a socket, and no process holds it any more


class Owner(NamedTuple):
    """Every process that may have sent the flow, at least one."""

    holders: tuple[Process, ...]
    certainty: Certainty = Certainty.EXACT

    @property
    def process(self) -> Process:
        """The one to show to the user."""
        return self.holders[0]


class Attribution(NamedTuple):
    """A source's answer: `how` the owner was found, in a word; the sockets' inodes, and the cookie if it was one."""

    how: str
    owner: Owner | None
    cookie: bytes | None = None
    sockets: tuple[int, ...] = ()

    @property
    def certainty(self) -> Certainty:
        """The owner's; GONE where there is none."""
        return self.owner.certainty if self.owner else Certainty.GONE


class Source(Protocol):
    """Something that can tell whose flow it is. A flow is its protocol and its four-tuple, as the app sends it."""

    def attribute(self, protocol: int, four_tuple: bytes) -> Attribution | None:
        """Answer at once, from what is known already; None when it takes a search."""

    def search(self, flows: Sequence[Key]) -> Iterator[tuple[Key, Attribution] | None]:
        """Search for all of these at once: an answer for each that has one. None now and then, to give way."""


def search_all(sources: tuple[Source, ...], flows: Sequence[Key]) -> Iterator[tuple[Key, Attribution] | None]:
    """Search source by source, for each flow until one answers."""
    left = dict.fromkeys(flows)
    for source in sources:
        for answer in source.search(tuple(left)) if left else ():
            if answer is not None:
                del left[answer[0]]
            yield answer
