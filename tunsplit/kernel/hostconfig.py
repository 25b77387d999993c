"""Puts a HostPlan in force on the host, keeps it there, and takes it away again.

In order: the firewall first; then what the kernel must not do (sysctls); the tun; routes, the closing ones before any
that lead somewhere; rules, the one that closes the way first of all. Taken away in reverse, so that at every step a
packet is either steered or refused. A change touches only what differs from the plan, whoever made it differ.

Nothing is written to disk. What is ours is known by its names and numbers (tunsplit/names.py), and the values of
sysctls before our change stand as comments in the nft table: all of it goes with the network namespace.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address

from tunsplit.errors import KernelError
from tunsplit.host import FAMILIES, HostPlan, Route, RouteType, Rule, Snapshot
from tunsplit.kernel import nft, sysctl
from tunsplit.kernel.rtnetlink import Rtnetlink
from tunsplit.kernel.sockdestroy import end_sockets
from tunsplit.names import PRIORITY_MARKED, PRIORITY_UNREACHABLE, ROUTE_PROTOCOL, TABLES

COMMENT_SIZE = 120  # nft takes 128
SETTLED = re.compile(r"sysctl (\S+) (\S*) (\S*)")  # path, value before, our value
ADDED = re.compile(r"ports (\S+) (\S+)")  # path, ranges that we added
TUN = re.compile(r"tun (\S+)((?: \S+)*)")  # name, addresses

LivePortsBySet = Mapping[str, Iterable[int]]


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

    Attributes:
        stays_closed: whether `release` leaves the way closed.
    """

    def __init__(self, rtnetlink: Rtnetlink, *, live_ports: Callable[[], LivePortsBySet] = dict) -> None:
        self._rtnetlink = rtnetlink
        self._live_ports = live_ports
        self._bodies: dict[str, str] | None = None  # of the tables, as last applied by us
        self._listings: list[str | None] = []  # as the kernel showed them then
        self._records: dict[str, str] | None = None  # path → comment
        self.stays_closed = False

    def apply(self, plan: HostPlan) -> bool:
        """Put the plan in force; return whether anything had to be changed.

        Over the leftovers of a killed daemon, over our own former plan, or over what others changed meanwhile.

        Raises:
            KernelError: the ruleset was refused, and nothing else was touched; or some steps failed, and all others
                are done. Either way nothing leads where it must not.
        """
        if self._records is None:
            self._records = dict(_records(nft.listing() or ""))
        failures = Failures()
        changed = self._forget_sysctls(plan, self._records, failures)
        wanted = list(_unsettled(plan, self._records))
        changed |= self._apply_ruleset(plan, self._records)
        for path, value in wanted:
            with failures.gathered():
                sysctl.write(path, value)
        changed |= bool(wanted)
        with failures.gathered():
            changed |= self._apply_tun(plan)
        now = self._rtnetlink.snapshot()
        changed |= self._apply_routes(plan, now, failures)
        changed |= self._apply_rules(plan, now, failures)
        failures.raise_any()
        return changed

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
                _end_sockets(nft.comments(nft.listing() or ""))
        else:
            _remove(self._rtnetlink, failures, delete_tun=False)
        self._bodies = self._records = None
        failures.raise_any()

    def _forget_sysctls(self, plan: HostPlan, records: dict[str, str], failures: Failures) -> bool:
        """Put back what an earlier plan set and this one does not."""
        planned = {one.path for one in plan.sysctls}
        past = [key for key in records if key.split("+")[0] not in planned]
        for key in past:
            with failures.gathered():
                _restore(records[key])
            del records[key]
        return bool(past)

    def _apply_ruleset(self, plan: HostPlan, records: Mapping[str, str]) -> bool:
        bodies = _bodies(plan, records)
        standing = _listings()
        if bodies == self._bodies and standing == self._listings:
            return False
        # The first one of this process takes nothing over from a dead one: its live ports died with it.
        anew = self._bodies is None or None in standing
        nft.apply(bodies, anew=anew, elements=self._live_ports() if anew else {})
        self._bodies, self._listings = bodies, _listings()
        return True

    def _apply_tun(self, plan: HostPlan) -> bool:
        """MTU, then addresses, then up: the kernel takes IPv6 away when an MTU passes through less than 1280."""
        if not plan.tun.exists:
            return False
        index, changed = plan.tun.index, False
        now = self._rtnetlink.snapshot()
        link = now.link_at(index)
        if link is None:
            raise KernelError(f"device {plan.tun.name} is gone")
        if link.mtu != plan.tun_mtu:
            self._rtnetlink.link_set(index, mtu=plan.tun_mtu)
            changed = True
        standing = [address.interface for address in now.addresses_of(link)]
        for interface in plan.tun_addresses:
            if interface not in standing:
                self._rtnetlink.add_address(index, interface)
                changed = True
        for interface in standing:
            if interface not in plan.tun_addresses and not interface.is_link_local:
                self._rtnetlink.delete_address(index, interface)
                changed = True
        if not link.up:
            self._rtnetlink.link_set(index, up=True)
            changed = True
        return changed

    def _apply_routes(self, plan: HostPlan, now: Snapshot, failures: Failures) -> bool:
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
        return bool(missing or surplus)

    def _apply_rules(self, plan: HostPlan, now: Snapshot, failures: Failures) -> bool:
        standing = [rule for rule in now.rules if is_ours(rule)]
        missing = [rule for rule in plan.rules if rule not in standing]
        # The way is closed first, then opened from the top.
        for rule in sorted(missing, key=lambda rule: (rule.priority != PRIORITY_UNREACHABLE, rule.priority)):
            with failures.gathered():
                self._rtnetlink.add_rule(rule)
        surplus = [rule for rule in standing if rule not in plan.rules]
        _delete_rules(self._rtnetlink, surplus, failures)
        return bool(missing or surplus)


def preview(plan: HostPlan) -> tuple[dict[str, str], list[tuple[str, str | None, str]]]:
    """What applying the plan would put into nftables and write to sysctls; nothing is changed.

    Returns:
        The tables' bodies by family; and of each sysctl its path, its value now (None: its device is to come), and its
        value then.
    """
    records = dict(_records(nft.listing() or ""))
    written: list[tuple[str, str | None, str]] = [
        (path, sysctl.read(path), value) for path, value in _unsettled(plan, records)
    ]
    own = f"/conf/{plan.tun.name}/"
    written += [
        (one.path, None, one.value) for one in plan.sysctls if own in one.path and sysctl.read(one.path) is None
    ]
    return _bodies(plan, records), written


def undo() -> list[str]:
    """Remove whatever of ours is in the calling thread's network namespace; return what was removed, in words.

    Needs nothing but the namespace itself, and may be called again.

    Raises:
        KernelError: some steps failed; all others are done.
    """
    failures = Failures()
    with Rtnetlink() as rtnetlink:
        removed = _remove(rtnetlink, failures, delete_tun=True)
    failures.raise_any()
    return removed


def _remove(rtnetlink: Rtnetlink, failures: Failures, *, delete_tun: bool) -> list[str]:
    """The tun's sockets, rules, routes, neighbours, the tun, sysctls, and the firewall last."""
    removed: list[str] = []
    records: list[str] = []
    with failures.gathered():
        records = nft.comments(nft.listing() or "")
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
                removed += _restore(comment)
    with failures.gathered():
        removed += [f"nft table {table}" for table in nft.delete()]
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


def _listings() -> list[str | None]:
    return [nft.listing(family) for family in nft.FAMILIES]


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
            # The tun's own end with it.
            if f"/conf/{plan.tun.name}/" not in one.path:
                records.setdefault(one.path, f"sysctl {one.path} {now} {one.value}")
            yield one.path, one.value
            continue
        standing, ours = sysctl.parse_ranges(now), sysctl.parse_ranges(one.value)
        if added := sysctl.without(ours, standing):
            for number, piece in enumerate(_pieces(one.path, added), len(records)):
                records[f"{one.path}+{number}"] = piece
            yield one.path, sysctl.format_ranges(sysctl.merged([*standing, *ours]))


def _pieces(path: str, ranges: sysctl.Ranges) -> Iterator[str]:
    """Comments of a length that nft takes; each stands for itself."""
    piece: sysctl.Ranges = []
    for one in ranges:
        if piece and len(f"ports {path} {sysctl.format_ranges([*piece, one])}") > COMMENT_SIZE:
            yield f"ports {path} {sysctl.format_ranges(piece)}"
            piece = []
        piece.append(one)
    yield f"ports {path} {sysctl.format_ranges(piece)}"


def _restore(comment: str) -> list[str]:
    """Put a value back to what it was before us, unless someone else has changed it since; say what was done."""
    if match := SETTLED.fullmatch(comment):
        path, before, ours = match.groups()
        if sysctl.read(path) == ours:
            sysctl.write(path, before)
            return [f"sysctl {path} = {ours}"]
    elif match := ADDED.fullmatch(comment):
        path, added = match.groups()
        standing = sysctl.parse_ranges(sysctl.read(path) or "")
        left = sysctl.without(standing, sysctl.parse_ranges(added))
        if left != standing:
            sysctl.write(path, sysctl.format_ranges(left))
            return [f"sysctl {path} = {added}"]
    return []


def _records(listed: str) -> Iterator[tuple[str, str]]:
    """The records in a table, each under its path; those of a list under path+number."""
    for number, comment in enumerate(nft.comments(listed)):
        if match := SETTLED.fullmatch(comment):
            yield match[1], comment
        elif match := ADDED.fullmatch(comment):
            yield f"{match[1]}+{number}", comment


def _bodies(plan: HostPlan, records: Mapping[str, str]) -> dict[str, str]:
    return {**plan.rulesets, "inet": plan.rulesets["inet"] + _recorded_chain(plan, records)}


def _recorded_chain(plan: HostPlan, records: Mapping[str, str]) -> str:
    """A chain that no packet enters, for what `undo` has to know."""
    tun = " ".join([plan.tun.name, *(str(address.ip) for address in plan.tun_addresses)])
    comments = [f"tun {tun}", *records.values()]
    return "chain recorded {\n" + "".join(f'\treturn comment "{comment}"\n' for comment in comments) + "}\n"
