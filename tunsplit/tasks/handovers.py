"""UDP ports that change hands: who died is taken in before a datagram is judged, and flows of the dead are closed."""

import logging
from collections import Counter
from collections.abc import Iterable

from tunsplit.engine.flow import FlowState
from tunsplit.engine.hold import Hold
from tunsplit.engine.nat import Nat
from tunsplit.engine.portdeaths import MOST, PortDeaths
from tunsplit.errors import KernelError
from tunsplit.kernel.sockdeaths import BATCH, SocketDeaths
from tunsplit.wire.ip import UDP

READS = 4  # of `BATCH` deaths each; what then is not read yet may be anybody's, and is read in the next turn

logger = logging.getLogger(__name__)


class Handovers:
    """Which UDP datagrams may be of another socket than the one that is found."""

    def __init__(self, deaths: SocketDeaths, hold: Hold, counters: Counter[str]) -> None:
        self._deaths = deaths
        self._hold = hold
        self._counters = counters
        self._ports = PortDeaths()
        self._dead: set[bytes] = set()
        self._overruns = 0

    def fileno(self) -> int:
        """What becomes readable when there is something to `take_in`."""
        return self._deaths.fileno()

    def take_in(self) -> None:
        """Note who has died since."""
        try:
            for _ in range(READS):
                deaths = self._deaths.read()
                for death in deaths:
                    if death.protocol == UDP:
                        self._ports.note(death.port, death.cookie)
                        if len(self._dead) < MOST:
                            self._dead.add(death.cookie)
                if len(deaths) < BATCH:
                    break
            else:
                self._ports.note_unknown()
        except KernelError as error:
            self._ports.note_unknown()
            self._counters["socket_deaths_failed"] += 1
            if self._counters["socket_deaths_failed"] == 1:
                logger.warning("nobody tells of dead sockets", extra={"error": str(error)})
        if self._overruns != self._deaths.overruns:
            self._overruns = self._deaths.overruns
            self._ports.note_unknown()

    def doubts(self, four_tuple: bytes, known: Iterable[bytes | None], *, held: bool = False) -> bool:
        """Whether a UDP datagram may be of a socket that has died since, other than those `known` by their cookies.

        To be asked when the socket has been found: who has died for it to have the port is told of by then.
        `held`: the datagram was read some time ago.
        """
        self.take_in()
        return self._ports.doubts(four_tuple[-4:-2], known, held=held)

    def carried(self, emptied: bool) -> None:
        """A turn has carried packets out of the tun, and seen it empty or not."""
        if self._ports:
            held = {key[-4:-2] for protocol, key in self._hold if protocol == UDP}
            self._ports.carried(emptied=emptied, held=held)

    def close_dead(self, nat: Nat) -> None:
        """Close the UDP flows whose socket is gone: no packet says so, and their ports would stay taken for minutes."""
        self.take_in()
        if self._dead:
            for flow in nat:
                if flow.protocol == UDP and flow.state is FlowState.OPEN and flow.cookie in self._dead:
                    nat.close(flow)
            self._dead.clear()
