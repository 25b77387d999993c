"""Puts a HostPlan in force on the host, keeps it there, and takes it away again.

In order: the firewall first; then what the kernel must not do (sysctls); the tun; routes, the closing ones before any
that lead somewhere; rules, the one that closes the way first of all. Taken away in reverse, so that at every step a
packet is either steered or refused. A change touches only what differs from the plan, whoever made it differ.

Nothing is written to disk. What is ours is known by its names and numbers (tunsplit/names.py), and the values of
sysctls before our change stand as comments in the nft tables: all of it goes with the network namespace.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address

from tunsplit.errors import KernelError
from tunsplit.host import FAMILIES, HostPlan, Route, RouteType, Rule, Snapshot, Sysctl, TunFacts
from tunsplit.kernel import nft, nftguard, sysctl, sysctlrecords
from tunsplit.kernel.drift import Drift
from tunsplit.kernel.nft import Nftables
from tunsplit.kernel.nftegress import Egress
from tunsplit.kernel.nftguard import Guard
from tunsplit.kernel.nfttables import LivePortsBySet, NftTables
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.kernel.sockdestroy import end_sockets
from tunsplit.names import PRIORITY_MARKED, PRIORITY_UNREACHABLE, ROUTE_PROTOCOL, TABLES

TUN = re.compile(r"tun (\S+)((?: \S+)*)")  # name, addresses
MOST_GENERATIONS = 8  # more changes than come before their events are read


class Failures:
    """Errors of steps that do not stop the steps after them; raised together at the end."""

    def __init__(self) -> None:
        self._errors: list[KernelError] = []

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Keep what a step raises."""
        try:
            yield
        except KernelError as error:
            self._errors.append(error)

    def raise_any(self) -> None:
        """Raise what was kept, as one."""
        if self._errors:
            raise KernelError("; ".join(str(error) for error in self._errors)) from self._errors[0]


class HostConfig:
    """What we have on the host, in the network namespace of the calling thread.

    Args:
        live_ports: the ports that NAT holds now, by set; a table that has to be made anew starts with them, so that
            the kernel answers none of their packets in between.
        guard: keeps the way closed while somebody has taken our tables away; None: nobody does. It is let go of by who
            has made it.
        nftables: sockets that stay open; None: there are some for each change alone.

    Attributes:
        stays_closed: whether `release` leaves the way closed.
        on_restored: told what others had changed, as (kind, words), once it is as it was.
        on_egress: told why the netdev table does not stand; None: it does.
        generations: the numbers of nftables' rulesets that our last changes made, as far as they are known.
        passing_rules: those of our rules that come and go with flows, beside any plan.
    """

    def __init__(
        self,
        rtnetlink: Rtnetlink,
        *,
        live_ports: Callable[[], LivePortsBySet] = dict,
        guard: Guard | None = None,
        nftables: Nftables | None = None,
    ) -> None:
        self._rtnetlink = rtnetlink
        self._guard = guard
        self._tables = NftTables(live_ports, nftables)
        self._egress = Egress(nftables)
        self._records: dict[str, str] | None = None  # path → comment
        self._plan: HostPlan | None = None  # the last one that was put in force whole
        self.stays_closed = False
        self.on_restored: Callable[[list[tuple[str, str]]], None] = lambda _: None
        self.on_egress: Callable[[str | None], None] = lambda _: None
        self.generations: deque[int] = deque(maxlen=MOST_GENERATIONS)
        self.passing_rules: Callable[[], Collection[Rule]] = frozenset

    def apply(self, plan: HostPlan, now: Snapshot | None = None) -> bool:
        """Put the plan in force; return whether anything had to be changed.

        Over the leftovers of a killed daemon, over our own former plan, or over what others changed meanwhile. `now` is
        what the host looks like, as of a moment ago: whoever changes it meanwhile causes an event.

        Raises:
            KernelError: the ruleset was refused, and nothing else was touched; or some steps failed, and all others
                are done. Either way nothing leads where it must not.
        """
        failures, drift = Failures(), Drift(self._plan)
        now = self._rtnetlink.snapshot() if now is None else now
        if self._records is None:
            standing = _listing()
            self._records = sysctlrecords.parse(standing)
            # A killed daemon's flows went with it: whoever only waits for an answer would never be told.
            with failures.gathered():
                _end_sockets(nft.comments(standing))
        self._plan = None
        changed = self._forget_sysctls(plan, self._records, failures)
        wanted = list(_unsettled(plan, self._records))
        drift.note_sysctls(wanted)
        changed |= self._apply_ruleset(_recorded(plan, self._records), drift)
        for path, value in wanted:
            with failures.gathered():
                sysctl.write(path, value)
        changed |= bool(wanted)
        for one in plan.tuns:
            with failures.gathered():
                changed |= self._apply_tun(one, plan.tun_mtu, now)
        changed |= self._apply_routes(plan, now, failures, drift)
        changed |= self._apply_rules(plan, now, failures, drift)
        for one in plan.tuns:
            with failures.gathered():
                changed |= self._forget_addresses(one, now)
        failures.raise_any()
        self._plan = plan
        if drift.found:
            self.on_restored(drift.found)
        return changed

    def is_settled(self) -> bool:
        """Whether every sysctl is as the plan in force wants it."""
        return self._plan is None or not any(True for _ in _unsettled(self._plan, {}))

    def release(self) -> None:
        """Take everything away, in reverse. The tun is left without addresses, and down.

        With `stays_closed` all of it stays but what uses the tun, which ends: the tables, the rules, and the routes
        that close. What led into the tun goes with the tun.

        Raises:
            KernelError: some steps failed; all others are done.
        """
        failures = Failures()
        if self.stays_closed:
            with failures.gathered():
                _end_sockets(nft.comments(_listing()))
        else:
            _remove(self._rtnetlink, failures, delete_tun=False, guard=self._guard)
        self.distrust_tables()
        self._records = self._plan = None
        failures.raise_any()

    def _forget_sysctls(self, plan: HostPlan, records: dict[str, str], failures: Failures) -> bool:
        """Put back what an earlier plan set and this one does not."""
        planned = {one.path for one in plan.sysctls}
        past = [key for key in records if key.split("+")[0] not in planned]
        for key in past:
            with failures.gathered():
                sysctlrecords.restore(records[key])
            del records[key]
        return bool(past)

    def _apply_ruleset(self, plan: HostPlan, drift: Drift) -> bool:
        changed = self._tables.apply(dict(plan.rulesets), plan.sets)
        if self._guard is not None:
            changed |= self._guard.apply(plan.guard)
        changed |= self._egress.apply(plan.egress)
        self.on_egress(self._egress.complaint)
        made = self._tables.generation, self._egress.generation
        self.generations.extend(one for one in made if one is not None and one not in self.generations)
        if self._tables.touched:
            drift.note_tables()
        return changed

    def distrust_tables(self) -> None:
        """Put our nft tables anew the next time, whatever they look like: somebody has touched them."""
        self._tables.distrust()
        self._egress.distrust()

    def _apply_tun(self, wanted: TunFacts, mtu: int, now: Snapshot) -> bool:
        """MTU, then addresses, then up: the kernel takes IPv6 away when an MTU passes through less than 1280."""
        if not wanted.link.exists:
            return False
        index, changed = wanted.link.index, False
        link = now.link_at(index)
        if link is None:
            raise KernelError(f"device {wanted.link.name} is gone")
        if link.mtu != mtu:
            self._rtnetlink.link_set(index, mtu=mtu)
            changed = True
        standing = [address.interface for address in now.addresses_of(link)]
        for interface in wanted.addresses:
            if interface not in standing:
                self._rtnetlink.add_address(index, interface)
                changed = True
        if not link.up:
            self._rtnetlink.link_set(index, up=True)
            changed = True
        return changed

    def _forget_addresses(self, wanted: TunFacts, now: Snapshot) -> bool:
        """After the routes: what still came into the tun without them could not be answered."""
        surplus = [
            address.interface
            for address in now.addresses_of(wanted.link)
            if address.interface not in wanted.addresses and not address.interface.is_link_local
        ]
        for interface in surplus:
            self._rtnetlink.delete_address(wanted.link.index, interface)
        return bool(surplus)

    def _apply_routes(self, plan: HostPlan, now: Snapshot, failures: Failures, drift: Drift) -> bool:
        standing = {route for route in now.routes if route.table in TABLES}
        missing = [route for route in plan.routes if route not in standing]
        for route in sorted(missing, key=lambda route: route.type == RouteType.UNICAST):
            with failures.gathered():
                self._rtnetlink.replace_route(route)
        # What was replaced is gone. To delete it all the same would take its successor: what a request leaves out,
        # the source address above all, fits any route (fib_trie.c, fib_table_delete).
        replaced = {(route.table, route.destination, route.metric) for route in missing}
        surplus = [
            route
            for route in standing.difference(plan.routes)
            if (route.table, route.destination, route.metric) not in replaced
        ]
        _delete_routes(self._rtnetlink, surplus, failures)
        drift.note_routes(missing, surplus)
        return bool(missing or surplus)

    def _apply_rules(self, plan: HostPlan, now: Snapshot, failures: Failures, drift: Drift) -> bool:
        passing = self.passing_rules()
        standing = {rule for rule in now.rules if is_ours(rule) and rule not in passing}
        missing = [rule for rule in plan.rules if rule not in standing]
        # The way is closed first, then opened from the top.
        for rule in sorted(missing, key=lambda rule: (rule.priority != PRIORITY_UNREACHABLE, rule.priority)):
            with failures.gathered():
                self._rtnetlink.add_rule(rule)
        surplus = standing.difference(plan.rules)
        _delete_rules(self._rtnetlink, surplus, failures)
        drift.note_rules(missing, surplus)
        return bool(missing or surplus)


def preview(plan: HostPlan) -> tuple[HostPlan, list[tuple[str, str | None, str]]]:
    """What applying the plan would put into nftables and write to sysctls; nothing is changed.

    Returns:
        The plan, with all that its tables are to hold; and of each sysctl its path, its value now (None: its
        device is to come), and its value then.
    """
    records = sysctlrecords.parse(_listing())
    written: list[tuple[str, str | None, str]] = [
        (path, sysctl.read(path), value) for path, value in _unsettled(plan, records)
    ]
    written += [
        (one.path, None, one.value) for one in plan.sysctls if _is_own(plan, one) and sysctl.read(one.path) is None
    ]
    return _recorded(plan, records), written


def undo() -> list[str]:
    """Remove whatever of ours is in the calling thread's network namespace; return what was removed, in words.

    Needs nothing but the namespace itself, and may be called again.

    Raises:
        KernelError: some steps failed; all others are done.
    """
    failures = Failures()
    with Rtnetlink() as rtnetlink:
        removed = _remove(rtnetlink, failures, delete_tun=True, guard=None)
    failures.raise_any()
    return removed


def _remove(rtnetlink: Rtnetlink, failures: Failures, *, delete_tun: bool, guard: Guard | None) -> list[str]:
    """The tun's sockets, rules, routes, neighbours, the tun, sysctls, and the firewall last, the guard after it."""
    removed: list[str] = []
    records: list[str] = []
    with failures.gathered():
        records = nft.comments(_listing())
    now = rtnetlink.snapshot()
    with failures.gathered():
        removed += _end_sockets(records)
    rules = [rule for rule in now.rules if is_ours(rule)]
    routes = [route for route in now.routes if route.table in TABLES]
    removed += _counted("rules", rules)
    removed += _counted("routes", routes)
    _delete_rules(rtnetlink, rules, failures)
    _delete_routes(rtnetlink, routes, failures)
    with failures.gathered():
        for neighbour in rtnetlink.neighbours():
            if neighbour.protocol == ROUTE_PROTOCOL:
                rtnetlink.neighbour_forget(neighbour.index, neighbour.address)
                removed.append(f"neighbour {neighbour.address}")
    for comment in records:
        if match := TUN.fullmatch(comment):
            with failures.gathered():
                removed += _remove_tun(rtnetlink, now, match[1], delete=delete_tun)
        else:
            with failures.gathered():
                removed += sysctlrecords.restore(comment)
    with failures.gathered():
        removed += [f"nft table {table}" for table in nft.delete()]
    with failures.gathered():
        if guard.apply("") if guard else nftguard.delete():
            removed.append(f"nft table {nftguard.TABLE}")
    return removed


def _counted(word: str, items: Iterable[Rule | Route]) -> list[str]:
    counts = Counter(item.family for item in items)
    return [f"{counts[family]} IPv{family} {word}" for family in FAMILIES if counts[family]]


def _end_sockets(records: Iterable[str]) -> list[str]:
    """End what still uses the tun's addresses, while its way is closed: IPv6 would go on with them in clear."""
    addresses = [ip_address(text) for one in records if (match := TUN.fullmatch(one)) for text in match[2].split()]
    ended = end_sockets(addresses) if addresses else 0
    return [f"{ended} sockets of the tun"] if ended else []


def _remove_tun(rtnetlink: Rtnetlink, now: Snapshot, name: str, *, delete: bool) -> list[str]:
    link = now.link(name)
    if link is None or link.kind != "tun":
        return []
    if delete:
        rtnetlink.delete_link(link)
        return [f"device {name}"]
    rtnetlink.link_set(link.index, up=False)
    for address in now.addresses_of(link):
        rtnetlink.delete_address(link.index, address.interface)
    return []


def is_ours(rule: Rule) -> bool:
    """Whether a rule is one of our block."""
    return rule.protocol == ROUTE_PROTOCOL and PRIORITY_MARKED <= rule.priority <= PRIORITY_UNREACHABLE


def _delete_routes(rtnetlink: Rtnetlink, routes: Iterable[Route], failures: Failures) -> None:
    """Those that lead somewhere before those that close."""
    for route in sorted(routes, key=lambda route: route.type != RouteType.UNICAST):
        with failures.gathered():
            rtnetlink.delete_route(route)


def _delete_rules(rtnetlink: Rtnetlink, rules: Iterable[Rule], failures: Failures) -> None:
    """From the bottom up, and the one that closes the way last."""
    for rule in sorted(rules, key=lambda rule: (rule.priority == PRIORITY_UNREACHABLE, -rule.priority)):
        with failures.gathered():
            rtnetlink.delete_rule(rule)


def _unsettled(plan: HostPlan, records: dict[str, str]) -> Iterator[tuple[str, str]]:
    """What has to be written, as (path, value); what is there now is added to the records first."""
    for one in plan.sysctls:
        now = sysctl.read(one.path)
        if now is None or now == one.value or now in one.good:
            continue
        if not one.is_list:
            if not _is_own(plan, one):
                records.setdefault(one.path, f"sysctl {one.path} {now} {one.value}")
            yield one.path, one.value
            continue
        standing, ours = sysctl.parse_ranges(now), sysctl.parse_ranges(one.value)
        if added := sysctl.without(ours, standing):
            sysctlrecords.add_ranges(records, one.path, added)
            yield one.path, sysctl.format_ranges(sysctl.merged([*standing, *ours]))


def _is_own(plan: HostPlan, one: Sysctl) -> bool:
    """Whether it is a setting of a tun, which ends with the tun."""
    return any(f"/conf/{tun.link.name}/" in one.path for tun in plan.tuns)


def _listing() -> str:
    """What has the records: our table, or where somebody has taken that away, the guard."""
    return nft.listing() or nftguard.listing()


def _recorded(plan: HostPlan, records: Mapping[str, str]) -> HostPlan:
    """The plan with what `undo` has to know, in chains that no packet enters."""
    tuns = (" ".join([one.link.name, *(str(address.ip) for address in one.addresses)]) for one in plan.tuns)
    rules = [f'return comment "{comment}"' for comment in (*(f"tun {tun}" for tun in tuns), *records.values())]
    chain = "chain recorded {\n" + "".join(f"\t{rule}\n" for rule in rules) + "}\n"
    return replace(
        plan,
        rulesets={**plan.rulesets, "inet": plan.rulesets["inet"] + chain},
        guard=plan.guard and plan.guard + nftguard.chain("recorded", rules),
    )
