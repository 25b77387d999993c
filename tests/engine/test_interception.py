"""Which flows to a resolver's port are answered, sent on a side, or refused."""

from ipaddress import ip_address

import pytest

from tunsplit.engine.dnstable import DnsTable
from tunsplit.engine.interception import Handling, handling

RELAY, LAN, PUBLIC, OTHER = map(ip_address, ("10.64.0.1", "192.168.50.53", "8.8.8.8", "192.0.2.53"))
APPS = pytest.mark.parametrize("excluded", [True, False], ids=["excluded", "included"])


def of(port, asked, *, excluded, tunnel_up=True, client=False, **table):
    return handling(
        DnsTable("linux", **{"relay": (RELAY,), **table}),
        port,
        asked,
        excluded=excluded,
        tunnel_up=tunnel_up,
        client=client,
    )


@APPS
@pytest.mark.parametrize("asked", [RELAY, OTHER])
def test_every_question_in_clear_is_answered_by_us(asked, excluded):
    assert Handling.ANSWER is of(53, asked, excluded=excluded)


@APPS
@pytest.mark.parametrize(
    ("custom", "asked", "included_side", "excluded_side"),
    [
        ((), RELAY, Handling.TUNNEL, Handling.TUNNEL),
        ((), OTHER, Handling.REFUSE, Handling.REFUSE),
        ((PUBLIC,), PUBLIC, Handling.TUNNEL, Handling.UPLINK),
        ((PUBLIC,), RELAY, Handling.REFUSE, Handling.REFUSE),
        ((LAN,), LAN, Handling.UPLINK, Handling.UPLINK),
    ],
)
def test_an_encrypted_one_reaches_the_resolvers_of_the_table_by_its_routes(
    custom, asked, included_side, excluded_side, excluded
):
    expected = excluded_side if excluded else included_side

    assert expected is of(853, asked, excluded=excluded, custom=custom)


@pytest.mark.parametrize(
    ("port", "asked", "excluded", "expected"),
    [
        (53, RELAY, True, Handling.ANSWER),
        (53, RELAY, False, Handling.ANSWER),
        (53, OTHER, True, Handling.UPLINK),
        (53, OTHER, False, Handling.REFUSE),
        (853, RELAY, False, Handling.TUNNEL),
        (853, OTHER, True, Handling.UPLINK),
        (853, OTHER, False, Handling.REFUSE),
    ],
)
def test_elsewhere_than_the_list_only_excluded_apps_ask(port, asked, excluded, expected):
    assert expected is of(port, asked, excluded=excluded, listed_only=True)


@APPS
@pytest.mark.parametrize("listed_only", [True, False])
@pytest.mark.parametrize(
    ("port", "asked", "expected"),
    [(53, OTHER, Handling.ANSWER), (853, LAN, Handling.UPLINK), (853, RELAY, Handling.REFUSE)],
)
def test_the_vpns_client_has_a_row_of_its_own(port, asked, expected, listed_only, excluded):
    assert expected is of(port, asked, excluded=excluded, client=True, system=(LAN,), listed_only=listed_only)
