"""L17, platform `per-app`: who asks our own stub on loopback is known by his socket."""

import pytest

from tests.netns.questions import ASKING, NAME
from tests.netns.stage import open_stage
from tunsplit.lab.addresses import LAN_RESOLVER, PUBLIC_RESOLVER

STUB = "127.0.0.54"
PROTOCOLS = pytest.mark.parametrize("protocol", ["udp", "tcp"])
PER_APP = {
    "platform": "per-app",
    "custom": [str(PUBLIC_RESOLVER[4])],
    "system": [str(LAN_RESOLVER[4])],
    "listen": [f"{STUB}:53", "[::1]:53"],
}


@PROTOCOLS
@pytest.mark.parametrize("stub", [STUB, "::1"])
async def test_each_app_that_asks_our_stub_asks_on_its_own_side(lab, protocol, stub):
    async with open_stage(lab, dns=PER_APP) as stage:
        for name, side, resolver in (("excluded", "uplink", "lan"), ("included", "tunnel", "public")):
            stage.clear()
            async with stage.app(getattr(stage, name)) as app:
                await app(ASKING)
                for _ in range(2):
                    assert resolver == await app("who(stub, protocol)", stub=stub, protocol=protocol)
            assert {side} == await stage.where(payload=NAME)


@PROTOCOLS
async def test_an_app_that_asks_another_resolver_gets_the_same(lab, protocol):
    async with open_stage(lab, dns=PER_APP) as stage:
        for name, side, resolver in (("excluded", "uplink", "lan"), ("included", "tunnel", "public")):
            stage.clear()
            async with stage.app(getattr(stage, name)) as app:
                await app(ASKING)
                assert resolver == await app("who('192.0.2.53', protocol)", protocol=protocol)
            assert {side} == await stage.where(payload=NAME)


async def test_getaddrinfo_asks_per_app_once_resolv_conf_is_taken_over(lab):
    """In mount namespaces whose /etc is a directory of its own; given back at the end, and after SIGKILL by `undo`."""
    # Where `ip netns exec` has mounted resolv.conf it is left alone: the stub is named by hand here.
    async with open_stage(lab, dns=PER_APP) as stage:
        for name, side, own in (("excluded", "uplink", LAN_RESOLVER[4]), ("included", "tunnel", PUBLIC_RESOLVER[4])):
            stage.clear()
            async with stage.app(getattr(stage, name)) as app:
                await app(RESOLVING, stub=STUB)
                assert str(own) == await app("socket.getaddrinfo('who.is', 80, socket.AF_INET)[0][4][0]")
            assert {side} == await stage.where(payload=NAME)


RESOLVING = """
import ctypes, tempfile
libc = ctypes.CDLL(None, use_errno=True)
assert not libc.unshare(0x20000)  # CLONE_NEWNS
assert not libc.mount(b"none", b"/", None, 0x44000, None)  # private, and all below
with tempfile.NamedTemporaryFile("w", delete=False) as file:
    file.write(f"nameserver {stub}\\n")
os.chmod(file.name, 0o644)
assert not libc.mount(file.name.encode(), b"/etc/resolv.conf", None, 0x1000, None), ctypes.get_errno()
os.unlink(file.name)
"""


async def test_an_app_that_is_blocked_is_refused_by_our_stub_at_once(lab):
    async with (
        open_stage(lab, dns=PER_APP) as stage,
        stage.app(stage.excluded) as one,
        stage.app(stage.included) as other,
    ):
        await one(ASKING)
        await other(ASKING)
        # One port, two sockets, an app of each side: nobody can tell whose question it is.
        for app in (one, other):
            await app("own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)")
            await app("own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1); own.bind(('127.0.0.1', 40053))")
        await one("own.sendto(question(), (stub, 53))", stub=STUB)
        answers = []
        for app in (one, other):
            try:
                answers.append(await app("told(own.recv(4096))"))
            except TimeoutError:
                continue  # the kernel gives the answer to one of them
        assert ["REFUSED"] == answers
        assert set() == await stage.where(port=53)
