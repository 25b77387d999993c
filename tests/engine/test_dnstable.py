"""Where questions go, row by row."""

from ipaddress import ip_address
from pathlib import Path

import pytest

from tunsplit.engine.dnstable import (
    TABLE,
    Choice,
    DnsTable,
    Resolver,
    Route,
    Server,
    Setting,
    as_markdown,
    is_private,
)

ROOT = Path(__file__).parent.parent.parent
RELAY, PRIVATE, PUBLIC, SYSTEM = map(ip_address, ("10.64.0.1", "192.168.50.54", "198.51.100.53", "192.168.50.53"))
CUSTOM = {"default": (), "private custom": (PRIVATE,), "public custom": (PUBLIC,)}


def table(platform: str, setting: str = "default", **others) -> DnsTable:
    return DnsTable(platform, **{"custom": CUSTOM[setting], "relay": (RELAY,), "system": (SYSTEM,), **others})


def shown(choice: Choice) -> list[str]:
    """Each resolver with its route."""
    return [f"{server.route.value} {server.address}" for server in choice.servers]


# What each platform documents: platform, setting, normal app, excluded app.
ROWS = f"""
windows    | default        | tunnel {RELAY}  | tunnel {RELAY}
windows    | private custom | lan {PRIVATE}   | lan {PRIVATE}
windows    | public custom  | tunnel {PUBLIC} | tunnel {PUBLIC}
linux      | default        | tunnel {RELAY}  | tunnel {RELAY}
linux      | private custom | lan {PRIVATE}   | lan {PRIVATE}
linux      | public custom  | tunnel {PUBLIC} | outside {PUBLIC}
android    | default        | tunnel {RELAY}  | outside {SYSTEM}
android    | private custom | lan {PRIVATE}   | outside {SYSTEM}
android    | public custom  | tunnel {PUBLIC} | outside {SYSTEM}
linux-2021 | default        | tunnel {RELAY}  | tunnel {RELAY}
linux-2021 | private custom | lan {PRIVATE}   | lan {PRIVATE}
linux-2021 | public custom  | tunnel {PUBLIC} | tunnel {PUBLIC}
macos      | default        | tunnel {RELAY}  | tunnel {RELAY}
macos      | private custom | refused         | refused
macos      | public custom  | tunnel {PUBLIC} | tunnel {PUBLIC}
per-app    | default        | tunnel {RELAY}  | outside {SYSTEM}
per-app    | private custom | lan {PRIVATE}   | outside {SYSTEM}
per-app    | public custom  | tunnel {PUBLIC} | outside {SYSTEM}
"""


@pytest.mark.parametrize("row", ROWS.strip().splitlines())
def test_a_platforms_row(row):
    platform, setting, normal, excluded = (cell.strip() for cell in row.split("|"))
    for is_excluded, wanted in ((False, normal), (True, excluded)):
        choice = table(platform, setting, lan_allow=True).choose(excluded=is_excluded, tunnel_up=True)

        assert ([] if wanted == "refused" else [wanted]) == shown(choice)
        assert wanted.split()[0] == choice.route.value


def test_every_row_is_tested():
    assert sum(map(len, TABLE.values())) == len(ROWS.strip().splitlines())


def test_a_choice_names_its_row():
    linux = table("linux", "public custom")

    assert "linux · public custom · excluded app" == linux.choose(excluded=True, tunnel_up=True).row
    assert "linux · public custom · normal app" == linux.choose(excluded=False, tunnel_up=True).row
    assert "android · system DNS · excluded app" == table("android").choose(excluded=True, tunnel_up=True).row
    assert "macos · private custom · normal app" == (
        table("macos", "private custom").choose(excluded=False, tunnel_up=True).row
    )


@pytest.mark.parametrize(
    "address",
    [
        "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "169.254.1.1", "127.0.0.53",
        "fe80::1", "fd00::1", "::1", "::ffff:192.168.0.1",
    ],
)  # fmt: skip
def test_a_private_resolver(address):
    assert is_private(ip_address(address))


@pytest.mark.parametrize("address", ["100.64.0.1", "172.32.0.1", "1.1.1.1", "2606:4700::1111", "::ffff:1.1.1.1"])
def test_a_public_resolver(address):
    assert not is_private(ip_address(address))


def test_of_a_mixed_list_each_resolver_follows_its_own_row():
    linux = table("linux", custom=(PRIVATE, PUBLIC))

    assert [f"lan {PRIVATE}", f"tunnel {PUBLIC}"] == shown(linux.choose(excluded=False, tunnel_up=True))
    assert [f"lan {PRIVATE}", f"outside {PUBLIC}"] == shown(linux.choose(excluded=True, tunnel_up=True))
    assert (Setting.PRIVATE, Setting.PUBLIC) == linux.settings


def test_what_a_platform_does_not_support_is_left_out_of_a_mixed_list():
    macos = table("macos", custom=(PRIVATE, PUBLIC))

    assert [f"tunnel {PUBLIC}"] == shown(macos.choose(excluded=False, tunnel_up=True))


def test_a_mixed_list_has_system_dns_once():
    android = table("android", custom=(PRIVATE, PUBLIC), lan_allow=True)

    assert [f"outside {SYSTEM}"] == shown(android.choose(excluded=True, tunnel_up=True))


def test_the_resolver_that_was_asked_goes_first_if_it_is_one_to_try():
    linux = table("linux", custom=(PRIVATE, PUBLIC))
    choice = linux.choose(excluded=False, tunnel_up=True, asked=PUBLIC)

    assert [f"tunnel {PUBLIC}", f"lan {PRIVATE}"] == shown(choice)
    assert (Route.TUNNEL, "linux · public custom · normal app") == (choice.route, choice.row)
    assert [f"lan {PRIVATE}", f"tunnel {PUBLIC}"] == shown(
        linux.choose(excluded=False, tunnel_up=True, asked=ip_address("8.8.8.8"))
    )


def test_without_local_network_sharing_androids_private_resolver_cannot_be_had():
    android = table("android", "private custom")

    assert Choice(Route.LAN, (), "android · private custom · normal app") == android.choose(
        excluded=False, tunnel_up=True
    )


def test_without_a_relay_resolver_there_is_none_to_ask():
    choice = table("linux", relay=()).choose(excluded=False, tunnel_up=True)

    assert (Route.TUNNEL, ()) == (choice.route, choice.servers)


def test_fallback_is_for_excluded_apps_while_the_tunnel_is_down():
    linux = table("linux", fallback=True)
    fallen = linux.choose(excluded=True, tunnel_up=False)

    assert (Server(SYSTEM, Route.OUTSIDE, "linux · default · excluded app · fallback"),) == fallen.servers
    assert [f"tunnel {RELAY}"] == shown(linux.choose(excluded=True, tunnel_up=True))
    assert [f"tunnel {RELAY}"] == shown(linux.choose(excluded=False, tunnel_up=False))
    assert [f"tunnel {RELAY}"] == shown(table("linux").choose(excluded=True, tunnel_up=False))
    lan = table("linux", "private custom", fallback=True)
    assert [f"lan {PRIVATE}"] == shown(lan.choose(excluded=True, tunnel_up=False))


def test_only_listed_resolvers_follow_the_table_where_it_is_said_so():
    linux = table("linux", listed_only=True)
    other = ip_address("8.8.8.8")
    for listed in (RELAY, SYSTEM, None):
        assert [f"tunnel {RELAY}"] == shown(linux.choose(excluded=False, tunnel_up=True, asked=listed))
    assert Choice(Route.REFUSED, (), "linux · not listed · normal app") == linux.choose(
        excluded=False, tunnel_up=True, asked=other
    )
    assert [f"outside {other}"] == shown(linux.choose(excluded=True, tunnel_up=True, asked=other))


def test_no_lan_route_leads_to_a_public_address():
    for rows in TABLE.values():
        for setting, cells in rows.items():
            for cell in cells:
                assert cell.route is not Route.LAN or (setting, cell.resolver) == (Setting.PRIVATE, Resolver.CUSTOM)


def test_the_documentation_shows_the_table():
    assert as_markdown() in (ROOT / "DESIGN.md").read_text()


@pytest.mark.parametrize("platform", TABLE)
@pytest.mark.parametrize("excluded", [True, False])
@pytest.mark.parametrize("tunnel_up", [True, False])
def test_the_vpns_client_asks_what_the_host_asked_before(platform, excluded, tunnel_up):
    """L39: whatever the platform; the one that it has asked goes first."""
    other = ip_address("192.0.2.99")
    asked = table(platform, "public custom", system=(SYSTEM, other), listed_only=True)
    choice = asked.choose(excluded=excluded, tunnel_up=tunnel_up, asked=other, client=True)

    assert [f"outside {other}", f"outside {SYSTEM}"] == shown(choice)
    assert f"{platform} · system DNS · tunnel client" == choice.row
    assert () == table(platform, system=()).choose(excluded=excluded, tunnel_up=tunnel_up, client=True).servers
