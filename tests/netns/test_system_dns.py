"""System DNS is found on the host, and a private one is asked on its own network only (L17)."""

import sys
from contextlib import asynccontextmanager

import pytest

from tests.netns.stage import start_app, until, where
from tunsplit.lab import addresses

pytestmark = pytest.mark.netns

LAN, PUBLIC = addresses.LAN_RESOLVER[4], addresses.PUBLIC_RESOLVER[4]
# In a mount namespace of its own, as `ip netns exec` makes one.
WITH_RESOLV_CONF = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
ASK = """
def ask_resolver():
    with udp('192.0.2.53', 53) as own:
        own.send(b'\\x12\\x34\\x01\\0\\0\\1\\0\\0\\0\\0\\0\\0\\3who\\2is\\0\\0\\x10\\0\\1')
        answer = own.recv(4096)
    return 'SERVFAIL' if answer[3] & 15 == 2 else [word for word in ('lan', 'public') if word.encode() in answer]
"""


@asynccontextmanager
async def running(lab, resolv_conf, **dns):
    """The platform that asks system DNS for excluded apps, and such an app."""
    program = lab.copy_program("python", "excluded")
    file, resolvers = lab.directory / "tunsplit.toml", lab.directory / "resolv.conf"
    file.write_text(lab.config([program], dns={"platform": "android", **dns}))
    resolvers.write_text(resolv_conf)
    words = ["unshare", "--mount", "sh", "-c", WITH_RESOLV_CONF, resolvers]
    async with (
        lab.host.start([*words, sys.executable, "-m", "tunsplit", "run", "-c", file]) as daemon,
        start_app(lab.host, program) as app,
    ):
        await daemon.wait_written("ready\n")
        await app(ASK)
        yield app


async def test_what_resolv_conf_names_is_asked_outside_but_for_stubs_and_the_relay_s(lab):
    text = f"nameserver 127.0.0.53\nnameserver {addresses.RELAY_RESOLVER[4]}\nnameserver {LAN}\n"
    async with running(lab, text) as app:
        assert ["lan"] == await app("ask_resolver()")
        assert {"uplink"} == await where(lab, direction="out", destination=LAN)
        assert set() == await where(lab, direction="out", destination=addresses.RELAY_RESOLVER[4])


async def test_a_private_one_is_not_asked_on_another_network_and_a_public_one_is(lab):
    """The same addresses behind another gateway: here another MAC."""
    async with running(lab, f"nameserver {LAN}\n") as app:
        assert ["lan"] == await app("ask_resolver()")
        lab.router.ip("link set lan0 address 02:00:00:00:00:99")
        lab.host.ip("neigh flush dev eth0")

        async def is_refused():
            return "SERVFAIL" == await app("ask_resolver()")

        await until(is_refused, "the LAN's resolver is somebody else's now")
        lab.uplink.clear()
        assert await is_refused()
        assert set() == await where(lab, direction="out", destination=LAN)
        (lab.directory / "resolv.conf").write_text(f"nameserver {PUBLIC}\n")

        async def is_answered():
            return ["public"] == await app("ask_resolver()")

        await until(is_answered, "the file was read anew")


TAKEN = """
mount --bind "$0" /etc
"$1" -c '
from ipaddress import ip_address
from tunsplit.kernel.resolvconf import takeover
takeover([ip_address("127.0.0.54")])'
cat /etc/resolv.conf
"$1" -m tunsplit undo
cat /etc/resolv.conf
"$1" -m tunsplit undo
"""


async def test_undo_gives_resolv_conf_back(lab):
    """L15: what a killed daemon had taken over; in a mount namespace that has an /etc of its own."""
    etc = lab.directory / "etc"
    etc.mkdir()
    (etc / "run.conf").write_text("nameserver 192.0.2.1\n")
    (etc / "resolv.conf").symlink_to("run.conf")
    done = await lab.host.run(["unshare", "--mount", "sh", "-ec", TAKEN, etc, sys.executable])
    assert "nameserver 127.0.0.54" in done.stdout.partition("/etc/resolv.conf\n")[0]
    assert ["/etc/resolv.conf", "nameserver 192.0.2.1", "nothing to undo"] == done.stdout.splitlines()[-3:]
    assert ["resolv.conf", "run.conf"] == sorted(one.name for one in etc.iterdir())
