"""The block of routing rules: their order, and whom each is for."""

from dataclasses import replace
from ipaddress import ip_network

from tests.engine.plans import LAN, RELAY, RELAY6, SETTINGS, WITH_GUESTS, planned, rules
from tunsplit.engine.steering import SteeringSettings
from tunsplit.host import Action
from tunsplit.names import (
    PRIORITY_CLOSED,
    PRIORITY_DNS,
    PRIORITY_FORWARDED,
    PRIORITY_LAN,
    PRIORITY_MARKED,
    PRIORITY_TRANSPORT,
    PRIORITY_TUN,
    TABLE_TUN,
    TABLE_UPLINK,
)


def test_the_block_is_in_order_and_for_this_hosts_own_packets():
    for family in (4, 6):
        found = [rule for rule in planned(WITH_GUESTS, settings=LAN).rules if rule.family == family]
        forwarding = [rule for rule in found if rule.priority == PRIORITY_FORWARDED]
        own = [rule for rule in found if rule not in forwarding]

        assert sorted(found, key=lambda rule: rule.priority) == found
        assert {"lo"} == {rule.iif for rule in own[:-1]}
        assert None is own[-1].iif
        assert ["eth0", "wg0", "docker0", "tunsplit1"] == [rule.iif for rule in forwarding]


def test_names_are_asked_for_by_the_tun_before_the_local_network():
    wanted = planned(settings=LAN)

    assert [(17, 53), (6, 53), (17, 853), (6, 853)] == [
        (rule.ipproto, rule.dport[0]) for rule in rules(wanted, PRIORITY_DNS) if rule.dport
    ]
    assert {TABLE_TUN} == {rule.table for rule in rules(wanted, PRIORITY_DNS)}
    assert [] == rules(planned(), PRIORITY_LAN)
    assert 1 == len(rules(wanted, PRIORITY_LAN))


def test_the_transport_is_known_by_mark_and_endpoint():
    (rule,) = rules(planned(), PRIORITY_TRANSPORT)

    assert (51820, ip_network("203.0.113.10/32"), 17, TABLE_UPLINK) == (rule.fwmark, rule.to, rule.ipproto, rule.table)
    assert [] == rules(planned(), PRIORITY_TRANSPORT, 6)


def test_the_transport_and_what_is_marked_never_fall_through_to_the_tun():
    for settings in (SETTINGS, replace(SETTINGS, fwmark=None)):
        wanted = planned(settings=settings)
        for family in (4, 6):
            outside = [
                one for priority in (PRIORITY_MARKED, PRIORITY_TRANSPORT) for one in rules(wanted, priority, family)
            ]
            closed = [replace(one, priority=PRIORITY_CLOSED, action=Action.UNREACHABLE, table=0) for one in outside]
            assert closed == rules(wanted, PRIORITY_CLOSED, family)
    assert PRIORITY_TRANSPORT < PRIORITY_CLOSED < PRIORITY_TUN


def test_the_transport_is_known_by_mark_alone_where_no_endpoint_is():
    wanted = planned(settings=replace(SETTINGS, endpoints=()))

    for family in (4, 6):
        (rule,) = rules(wanted, PRIORITY_TRANSPORT, family)
        assert (51820, None, None) == (rule.fwmark, rule.to, rule.ipproto)


def test_the_transport_is_known_by_endpoint_and_owner_where_no_mark_is():
    settings = replace(SETTINGS, fwmark=None, endpoints=(RELAY, RELAY6), transport_uid=990)
    four, six = (rules(planned(settings=settings), PRIORITY_TRANSPORT, family) for family in (4, 6))

    assert [(0, 0), (990, 990)] == [rule.uidrange for rule in four]
    assert {(17, (51820, 51820), None)} == {(rule.ipproto, rule.dport, rule.fwmark) for rule in four}
    assert {(6, (443, 443), ip_network("2001:db8:113::10/128"))} == {
        (rule.ipproto, rule.dport, rule.to) for rule in six
    }


def test_without_a_transport_of_its_own_nothing_passes_for_one():
    assert [] == rules(planned(settings=SteeringSettings(tunnel="wg0")), PRIORITY_TRANSPORT)
