"""Steering that stands already: what is applied again over a network that has changed."""

import os
import time
from dataclasses import replace
from ipaddress import ip_interface, ip_network

import pytest

from tests.hosts import (
    DOWN,
    FAR4,
    FAR6,
    LAN4,
    LAN_ALLOWED,
    ROUTER4,
    SETTINGS,
    TUN,
    TUN4,
    TUN6,
    TUNNEL,
    UP,
    UPLINK,
    run,
    without_tun,
)
from tunsplit.host import Rule
from tunsplit.kernel import nft
from tunsplit.kernel.hostconfig import HostConfig
from tunsplit.kernel.nftsocket import NftSocket
from tunsplit.kernel.rtnetlink import Rtnetlink, RtnetlinkEvents

pytestmark = pytest.mark.netns


def test_applied_twice_nothing_changes(host, config):
    with RtnetlinkEvents() as events:
        assert config.apply(host.plan(LAN_ALLOWED))
        while events.read():  # of addresses the kernel tells a little later
            time.sleep(0.2)
        assert not config.apply(host.plan(LAN_ALLOWED))
        assert [] == events.read()


def test_rules_of_flows_stay_while_their_flows_live(host, config, rtnetlink):
    config.apply(host.plan())
    rule = Rule(4, 79, iif="lo", to=ip_network("198.51.100.1"), ipproto=17, table=7508, protocol=117)
    rtnetlink.add_rule(rule)
    config.passing_rules = lambda: {rule}

    assert not config.apply(host.plan())
    assert rule in rtnetlink.rules(4)
    config.passing_rules = set
    assert config.apply(host.plan())
    assert rule not in rtnetlink.rules(4)


def test_the_leftovers_of_a_killed_daemon_are_taken_over(host, rtnetlink):
    before = host.state()
    first = HostConfig(rtnetlink)
    first.apply(host.plan(LAN_ALLOWED))
    host.ip("route add 203.0.113.0/24 dev eth0 table 7503")
    run("nft", "add", "element", *nft.MAIN.split(), "nat_tcp", "{ 50000 }")
    second = HostConfig(rtnetlink)

    assert second.apply(host.plan())
    assert not second.apply(host.plan())
    assert TUN == host.way(LAN4)
    assert "50000" not in run("nft", "list", "table", *nft.MAIN.split())
    second.release()
    assert before.splitlines() == without_tun(host.state(), before)


def test_what_others_take_away_comes_back_with_the_live_ports(host, rtnetlink):
    config = HostConfig(rtnetlink, live_ports=lambda: {"nat_tcp": [50001, 50002], "nat_udp": []})
    config.apply(host.plan())
    shown = host.state()
    run("nft", "flush", "ruleset")
    host.ip("rule del pref 81")
    host.ip("-6 route flush table 7501")

    assert config.apply(host.plan())

    assert "50001, 50002" in run("nft", "list", "set", *nft.MAIN.split(), "nat_tcp")
    assert sorted(shown.splitlines()) == sorted(host.state().splitlines())


def test_what_others_change_is_told_once_it_is_as_it_was(host, config):
    told: list[tuple[str, str]] = []
    config.on_restored = told.extend
    config.apply(host.plan())
    host.ip("address add 10.64.0.3/32 dev wg0")
    config.apply(host.plan())
    assert [] == told  # it was our own plan that changed

    run("nft", "flush", "chain", *nft.MAIN.split(), "outgoing")
    host.ip("rule del pref 81")
    host.ip("rule add pref 81 iif lo lookup main protocol 117")
    host.ip("-6 route flush table 7501")
    host.ip("route add 198.51.100.0/24 dev eth0 table 7502")
    run("sysctl", "-qw", "net.ipv4.conf.eth0.arp_ignore=0")
    assert not config.is_settled()
    config.apply(host.plan())

    assert config.is_settled()
    assert [("sysctls", "sysctl net/ipv4/conf/eth0/arp_ignore"), ("tables", "nft tables")] == told[:2]
    words = [words for kind, words in told if kind == "routes"]
    assert "unreachable route ::/0 in table 7501" in words
    assert "foreign unicast route 198.51.100.0/24 on device" in words[-1]
    assert ["IPv4 rule 81", "foreign IPv4 rule 81"] == [words for kind, words in told if kind == "rules"]
    told.clear()
    config.apply(host.plan())
    assert [] == told


def test_tables_that_somebody_has_touched_are_put_anew_whatever_they_look_like(host, rtnetlink):
    """What a set holds is in no listing."""
    config = HostConfig(rtnetlink, live_ports=lambda: {"nat_tcp": [50001]})
    config.apply(host.plan())
    run("nft", "add", "element", *nft.MAIN.split(), "nat_tcp", "{ 50001, 50002 }")
    known = list(config.generations)
    config.distrust_tables()

    assert config.apply(host.plan())
    assert 2 == len(set(config.generations) - set(known))  # the firewall's, and the netdev table's
    assert "elements = { 50001 }" in run("nft", "list", "set", *nft.MAIN.split(), "nat_tcp")


def test_what_somebody_puts_there_at_the_very_moment_is_not_taken_for_ours(host, config, monkeypatch):
    real = nft.apply

    def disturbed(*arguments, **others):
        real(*arguments, **others)
        run("nft", "flush", "ruleset")

    with monkeypatch.context() as patch:
        patch.setattr(nft, "apply", disturbed)
        config.apply(host.plan())
    assert 1 == len(config.generations)  # of the netdev table, which came after it

    assert config.apply(host.plan())
    assert "policy drop" in (nft.listing() or "")
    with NftSocket() as socket:
        assert socket.generation() in config.generations
    assert not config.apply(host.plan())


def test_a_netdev_table_that_cannot_be_had_fails_alone(host, config):
    """As where a device of it has just gone, or the kernel has no such hook."""
    told: list[str | None] = []
    config.on_egress = told.append
    wanted = host.plan()
    refused = replace(wanted, egress=replace(wanted.egress, body="no such words\n", body_now="nor such\n"))
    assert config.apply(refused)
    assert "policy drop" in (nft.listing() or "")
    assert nft.listing("netdev") is None
    assert not config.apply(refused)
    assert all("syntax error" in (one or "") for one in told)

    assert config.apply(wanted)
    assert told[-1] is None
    assert all(name in (nft.listing("netdev") or "") for name in (UPLINK, TUNNEL))
    assert not config.apply(wanted)
    assert config.apply(host.plan(replace(SETTINGS, firewall=False)))
    assert nft.listing("netdev") is None


def test_a_list_that_somebody_empties_is_recorded_once(host, config):
    before = host.state()
    config.apply(host.plan())
    records = nft.comments(nft.listing() or "")
    for _ in range(3):
        run("sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=")
        assert config.apply(host.plan())

    assert records == nft.comments(nft.listing() or "")
    config.release()
    assert before.splitlines() == without_tun(host.state(), before)


def held(name: str) -> str:
    return run("nft", "list", "set", *nft.MAIN.split(), name)


def renumber(host, old: str, new: str) -> None:
    host.ip(f"address del {old}/32 dev wg0")
    host.ip(f"address add {new}/32 dev wg0")


def test_a_renumbered_tunnel_changes_elements_and_no_text(host, config, monkeypatch):
    config.apply(host.plan())
    renumber(host, "10.64.0.2", "10.64.0.3")
    with monkeypatch.context() as patch:
        patch.setattr(nft, "apply", None)  # nobody may call it

        assert config.apply(host.plan())
        assert not config.apply(host.plan())
    with NftSocket() as socket:
        assert socket.generation() in config.generations
    assert "elements = { 10.64.0.3 }" in held("tunnel4")
    assert "elements = { 10.64.0.3 }" in run("nft", "list", "set", "arp", "tunsplit", "tunnel4")


def test_elements_that_cannot_be_changed_come_with_all_else_anew(host, config):
    config.apply(host.plan())
    run("nft", "add", "element", *nft.MAIN.split(), "tunnel4", "{ 10.64.0.9 }")
    run("nft", "delete", "element", *nft.MAIN.split(), "tunnel4", "{ 10.64.0.2 }")
    renumber(host, "10.64.0.2", "10.64.0.3")

    assert config.apply(host.plan())
    assert "elements = { 10.64.0.3 }" in held("tunnel4")


def test_sockets_that_stay_open_serve_as_well(host, rtnetlink):
    with nft.Nftables() as nftables:
        config = HostConfig(rtnetlink, nftables=nftables)
        config.apply(host.plan())
        renumber(host, "10.64.0.2", "10.64.0.3")
        assert config.apply(host.plan())
        assert "elements = { 10.64.0.3 }" in held("tunnel4")
        run("nft", "flush", "ruleset")

        assert config.apply(host.plan())
        assert "elements = { 10.64.0.3 }" in held("tunnel4")
        assert not config.apply(host.plan())
        config.release()


def test_live_ports_and_counters_outlive_a_changed_ruleset(host, config):
    config.apply(host.plan())
    run("nft", "add", "element", *nft.MAIN.split(), "nat_udp", "{ 50000 }")
    host.ip("address add 10.64.0.3/32 dev wg0")

    assert config.apply(host.plan())

    table = run("nft", "list", "table", *nft.MAIN.split())
    assert "elements = { 50000 }" in table
    assert "10.64.0.3" in table


def test_a_renumbered_uplink_changes_its_own_table_and_nothing_else(host, config):
    config.apply(host.plan())
    shown = (
        host.ip("route show table 7502"),
        sorted(host.ip("rule").replace("192.168.50.2", "192.168.60.2").split("\n")),
    )
    host.ip("address del 192.168.50.2/24 dev eth0")
    host.ip("address add 192.168.60.2/24 dev eth0")
    host.ip("route add default via 192.168.60.1")

    assert config.apply(host.plan())

    assert f"{UPLINK} via 192.168.60.1" == host.way(f"{FAR4} {UP}")
    assert "192.168.50" not in host.ip("route show table 7501")
    assert shown == (host.ip("route show table 7502"), sorted(host.ip("rule").split("\n")))


def test_a_new_uplink_takes_over_and_the_old_one_gets_its_sysctls_back(host, config):
    config.apply(host.plan())
    host.ip("link add wlan0 type veth peer name far")
    host.ip("link set wlan0 up")
    host.ip("link set far up")
    host.ip("address add 172.20.0.2/24 dev wlan0")
    host.ip("route del default")
    host.ip("-6 route del default")
    host.ip("route add default via 172.20.0.1")

    config.apply(host.plan())

    assert "wlan0 via 172.20.0.1" == host.way(f"{FAR4} {UP}")
    assert ("0", "1") == (host.sysctl("net/ipv4/conf/eth0/arp_ignore"), host.sysctl("net/ipv4/conf/wlan0/arp_ignore"))
    assert not config.apply(host.plan())


def test_a_tunnel_that_is_gone_closes_its_way_and_leaves_the_uplink_alone(host, config):
    config.apply(host.plan())
    os.close(host.tunnel)
    config.apply(host.plan())

    assert "closed" == host.way(f"{FAR4} {DOWN}")
    assert f"{UPLINK} via {ROUTER4}" == host.way(f"{FAR4} {UP}")
    assert TUN == host.way(FAR4)


def test_an_uplink_that_is_gone_closes_its_way(host, config):
    config.apply(host.plan())
    host.ip("link del eth0")
    config.apply(host.plan())

    assert "closed" == host.way(f"{FAR4} {UP}")
    assert TUNNEL == host.way(f"{FAR4} {DOWN}")


def test_no_default_route_is_no_error(host, config):
    host.ip("route del default")
    host.ip("-6 route del default")

    config.apply(host.plan())

    assert "closed" == host.way(f"{FAR4} {UP}")
    assert UPLINK == host.way(f"{LAN4} {UP}")
    assert TUN == host.way(FAR4)


def test_without_ipv6_there_is_no_ipv6_part_but_the_closed_way(host, config):
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    before = host.state()
    config.apply(host.plan())

    rules = [line for line in host.ip("-6 rule").splitlines() if "proto 117" in line]
    assert ["84:\tfrom all unreachable proto 117"] == rules
    assert TUN == host.way(FAR4)
    config.release()
    assert before.splitlines() == without_tun(host.state(), before)


def test_ipv6_that_comes_back_is_steered(host, config):
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "1")
    config.apply(host.plan())
    host.sysctl("net/ipv6/conf/all/disable_ipv6", "0")
    host.ip("address add 2001:db8:50::2/64 dev eth0 nodad")
    config.apply(host.plan())

    assert TUN == host.way(FAR6)


def test_stricter_values_stay_and_what_others_changed_stays(host, config):
    host.sysctl("net/ipv4/conf/eth0/arp_ignore", "2")
    config.apply(host.plan())
    assert "2" == host.sysctl("net/ipv4/conf/eth0/arp_ignore")

    host.sysctl("net/ipv4/conf/eth0/arp_announce", "1")
    config.release()

    assert ["2", "1"] == [host.sysctl(f"net/ipv4/conf/eth0/arp_{name}") for name in ("ignore", "announce")]


def test_the_tun_has_its_addresses_and_the_smaller_mtu(host, config):
    config.apply(host.plan())

    with Rtnetlink() as rtnetlink:
        now = rtnetlink.snapshot()
    tun = now.link(TUN)
    assert tun is not None
    assert (True, 1420) == (tun.up, tun.mtu)
    assert {ip_interface(TUN4), ip_interface(TUN6)} == {address.interface for address in now.addresses_of(tun)}
    assert not [route for route in now.routes_of(254) if route.oif == tun.index]


def test_a_family_leaves_the_tun_when_no_side_has_it(host, config):
    config.apply(host.plan())
    host.ip("-6 address flush dev eth0 scope global")
    host.ip("-6 address flush dev wg0 scope global")
    config.apply(host.plan())

    assert "closed" == host.way(FAR6)
    assert TUN6 not in host.ip("address show dev tunsplit0")
    assert TUN == host.way(FAR4)


def test_an_address_of_the_tun_goes_after_the_ways_into_it(host, config, rtnetlink, monkeypatch):
    """Between the two, what an app sends would come with a source that cannot be answered."""
    config.apply(host.plan())
    host.ip("-6 address flush dev eth0 scope global")
    host.ip("-6 address flush dev wg0 scope global")
    ways = []
    delete = rtnetlink.delete_address

    def note_and_delete(*arguments):
        ways.append(host.way(FAR6))
        delete(*arguments)

    monkeypatch.setattr(rtnetlink, "delete_address", note_and_delete)
    config.apply(host.plan())

    assert ["closed"] == ways


def test_a_route_that_the_kernel_refuses_stops_nothing_else(host, config):
    plan = host.plan()
    bad = replace(plan.routes[0], destination=ip_network("10.9.0.0/16"), table=7501, type=plan.routes[0].type.UNICAST)

    with pytest.raises(Exception, match=r"10\.9\.0\.0/16"):
        config.apply(replace(plan, routes=(bad, *plan.routes)))

    assert TUN == host.way(FAR4)
    assert f"{UPLINK} via {ROUTER4}" == host.way(f"{FAR4} {UP}")
