"""Tells apps that a flow of theirs has ended, before they send anything.

Theory of operation. Who sends is answered by what refuses it. Who only waits would wait on: for the answer to a SYN
that went out by a device which is gone, or for a server that cannot reach it any more. So the socket of a TCP flow is
destroyed: its app gets ECONNABORTED at once, and what the kernel sends to the peer ends in the tun. The sender of
datagrams or of an echo request is sent the ICMP error that refuses them, which ends the wait of a connected socket.
A socket that has taken the four-tuple over since is another one, and is left alone.
"""

import logging
from collections import deque

import trio

from tunsplit.engine.flow import Flow
from tunsplit.errors import KernelError
from tunsplit.kernel.sockdiag import SockDiag
from tunsplit.tasks.answers import Answers
from tunsplit.wire.ip import TCP

BATCH = 16  # ≈ 1 ms

logger = logging.getLogger(__name__)


class Notices:
    """What is still to be told. There are no more than flows were open."""

    def __init__(self, diag: SockDiag, answers: Answers) -> None:
        self._diag = diag
        self._answers = answers
        self._ended: deque[Flow] = deque()
        self._news = trio.Event()

    def ended(self, flow: Flow) -> None:
        """A flow has lost its way; its app is told soon."""
        self._ended.append(flow)
        self._news.set()

    async def tell(self) -> None:
        """Tell, until cancelled."""
        while True:
            while not self._ended:
                self._news = trio.Event()
                await self._news.wait()
            for _ in range(min(len(self._ended), BATCH)):
                self._tell(self._ended.popleft())
            await trio.lowlevel.checkpoint()

    def _tell(self, flow: Flow) -> None:
        if flow.protocol != TCP:
            self._answers.ended(flow)
            return
        if flow.forwarded:  # its socket is elsewhere: the guest's next segment is refused
            return
        try:
            self._diag.destroy(TCP, flow.key, flow.cookie)
        except KernelError as error:
            logger.warning(
                "a socket cannot be ended: its app hears of it with its next packet", extra={"error": str(error)}
            )
