"""The pump between fakes: a tun, and a device of a side."""

from collections import Counter

from tests.fakes.devices import FAR4, HOST4, ROUTER4, ROUTER_MAC, TUN4, FakeTun, nat, opened
from tests.fakes.judges import as_real
from tunsplit.tasks.pump import Pump
from tunsplit.tasks.tuns import Tuns

FLOW, OUTSIDE = f"{TUN4}:5000 > {FAR4}:53", f"{HOST4}:50000 > {FAR4}:53"
REPLY, BACK = f"{FAR4}:53 > {HOST4}:50000", f"{FAR4}:53 > {TUN4}:5000"


class Pumps:
    """Both pumps between a fake tun and a fake device."""

    def __init__(self, side, table=None):
        self.side = side
        self.tun, self.guests = FakeTun(), FakeTun()
        self.tuns = Tuns(as_real(self.tun), as_real(self.guests))
        self.table = nat() if table is None else table
        self.counters: Counter[str] = Counter()
        self.passed_by: list[bytes] = []
        self.heard: list[object] = []
        self.unclaimed: list[bytes] = []
        side.neighbour(ROUTER4, ROUTER_MAC)
        if table is None:
            self.flow = opened(self.table, FLOW, side.way())
        self.opened: list[Pump] = []
        self.pump = self.pump_with(lambda _, packet, __: self.passed_by.append(packet))

    def pump_with(self, passed_by):
        pump = Pump(
            self.tuns, self.table, passed_by, passed_by, self.counters, heard=lambda *told: self.heard.append(told),
            unclaimed=lambda _, unknown, __: self.unclaimed.append(unknown.packet),
        )  # fmt: skip
        pump.attach(self.side.device)
        self.opened.append(pump)
        return pump

    def close(self):
        for pump in self.opened:
            pump.close()
        self.tun.close()
        self.guests.close()
        self.side.close()
