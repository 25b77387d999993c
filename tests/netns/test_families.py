"""IPv6 is split like IPv4 (L8): the nine rows of the family matrix, for both kinds of apps, on both wires."""

import json
import re
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.netns.stage import AGENT, HOST, HOST_TUNNEL, REFUSED, RELAY, SERVER, TUN, App, open_stage, until
from tunsplit.lab import open_lab

pytestmark = pytest.mark.netns

PROTOCOLS = ("tcp", "udp", "echo")
SIDES = {"excluded": "uplink", "included": "tunnel"}
SEEN_AS = {"uplink": HOST, "tunnel": RELAY}
# Which versions of IP the uplink has, and the tunnel, row by row.
ROWS = [
    ((4, 6), (4, 6)),
    ((4,), (4,)),
    ((4, 6), (4,)),
    ((4,), (4, 6)),
    ((6,), (6,)),
    ((4, 6), (6,)),
    ((6,), (4, 6)),
    ((6,), (4,)),
    ((4,), (6,)),
]


async def ask(app: App, protocol: str, version: int) -> str:
    """What comes of a question to the server: the address that it saw, or that it was refused at once."""
    try:
        seen_as: str = await app(f"ask('{protocol}', SERVER{version})")
    except OSError as error:
        if not re.search(REFUSED, str(error)):  # a timeout, above all
            raise
        return "refused"
    return seen_as


async def tun_families(stage) -> set[int]:
    """The versions of IP of which the tun has an address."""
    (link,) = json.loads((await stage.lab.host.run(["ip", "-json", "address", "show", TUN])).stdout)
    return {4 if one["family"] == "inet" else 6 for one in link["addr_info"]}


@pytest.mark.parametrize(("uplink", "tunnel"), ROWS, ids=[f"row{number}" for number in range(1, len(ROWS) + 1)])
async def test_a_family_that_the_apps_own_side_lacks_is_refused_and_never_on_the_other(uplink, tunnel):
    """L8: TCP, UDP and echo; row 1, where nothing is refused, is the control of the others."""
    has = {"uplink": uplink, "tunnel": tunnel}
    async with open_lab(uplink=uplink, tunnel=tunnel) as lab, open_stage(lab) as stage:
        for name, side in SIDES.items():
            async with stage.app(getattr(stage, name)) as app:
                for version in (4, 6):
                    there = version in has[side]
                    for protocol in PROTOCOLS:
                        answer = await ask(app, protocol, version)
                        seen_as = "" if protocol == "echo" else str(SEEN_AS[side][version])
                        assert answer == (seen_as if there else "refused"), (name, protocol, version)
                    assert await stage.where(address=SERVER[version]) == ({side} if there else set())
                    stage.clear()
        assert {*uplink, *tunnel} == await tun_families(stage)


async def test_the_tun_has_a_family_only_while_a_side_has_it():
    """L8: it comes and goes with the sides' addresses, and the apps' ways with it."""
    async with (
        open_lab(uplink=(4,), tunnel=(4,)) as lab,
        open_stage(lab) as stage,
        stage.app(stage.excluded) as excluded,
        stage.app(stage.included) as included,
    ):

        async def wait_families(*versions):
            async def are_there():
                return set(versions) == await tun_families(stage)

            await until(are_there, f"the tun has {versions}")

        assert ["refused"] * 2 == [await ask(app, "tcp", 6) for app in (excluded, included)]
        lab.host.ip(f"address add {HOST_TUNNEL[6]} dev wg0")
        await wait_families(4, 6)
        assert ["refused", str(RELAY[6])] == [await ask(app, "tcp", 6) for app in (excluded, included)]
        assert {"tunnel"} == await stage.where(address=SERVER[6])
        stage.clear()

        lab.host.ip(
            f"address delete {HOST_TUNNEL[6]} dev wg0\naddress add {HOST[6]}/64 dev eth0\n"
            "route add default via 2001:db8:50::1"
        )

        async def is_on_the_uplink():
            return str(HOST[6]) == await ask(excluded, "tcp", 6)

        await until(is_on_the_uplink, "the excluded app has IPv6")
        assert "refused" == await ask(included, "tcp", 6)
        assert {"uplink"} == await stage.where(address=SERVER[6])

        lab.host.ip(f"address delete {HOST[6]}/64 dev eth0")
        await wait_families(4)
        for app, side in ((excluded, "uplink"), (included, "tunnel")):
            assert ["refused"] * 3 == [await ask(app, protocol, 6) for protocol in PROTOCOLS]
            assert str(SEEN_AS[side][4]) == await ask(app, "tcp", 4)


# getaddrinfo sorts by the source address that each destination would have (RFC 6724), which here is the tun's.

NAME = "both.example"


@asynccontextmanager
async def start_resolving_app(lab, program) -> AsyncIterator[App]:
    """Run an app for which a name has two addresses, by a file of its own instead of /etc/hosts."""
    hosts = lab.directory / "hosts"
    hosts.write_text("".join(f"{SERVER[version]} {NAME}\n" for version in (4, 6)))
    hide = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", hide, "sh", hosts, program, "-I", "-S", "-u", AGENT]
    async with lab.host.start(command, stdin=subprocess.PIPE) as running:
        yield App(running)


async def look_up(app: App) -> list[int]:
    """The versions of IP in the order in which an app would try them."""
    found = await app("[entry[4][0] for entry in socket.getaddrinfo(name, 7, type=socket.SOCK_STREAM)]", name=NAME)
    return [6 if ":" in address else 4 for address in found]


@pytest.mark.parametrize(
    ("uplink", "tunnel", "order"),
    [((4, 6), (4, 6), [6, 4]), ((4, 6), (4,), [6, 4]), ((4,), (4,), [4, 6]), ((6,), (6,), [6, 4])],
    ids=["row1", "row3", "row2", "row5"],
)
async def test_apps_prefer_ipv6_or_ipv4_as_they_would_without_tunsplit(uplink, tunnel, order):
    """L8, RFC 6724: of both apps; before the start, while it runs, and after its end."""
    async with open_lab(uplink=uplink, tunnel=tunnel) as lab:
        programs = [lab.copy_program("python", name) for name in ("excluded", "included")]
        async with start_resolving_app(lab, programs[0]) as excluded, start_resolving_app(lab, programs[1]) as included:
            assert [order, order] == [await look_up(app) for app in (excluded, included)]
            async with lab.tunsplit(lab.config(programs[:1])):
                assert [order, order] == [await look_up(app) for app in (excluded, included)]
            assert [order, order] == [await look_up(app) for app in (excluded, included)]


async def test_with_a_local_address_on_the_tun_apps_would_prefer_ipv4(lab):
    """The control of the above: it is the tun's address that decides."""
    tun = {"address": ["10.128.0.1/32", "fd00:77::1/128"]}
    async with open_stage(lab, tun=tun) as stage, start_resolving_app(lab, stage.included) as app:
        assert [4, 6] == await look_up(app)
