"""No flow leaves in clear that a policy of the host's IPsec is to encrypt: packet sockets send below IP."""

import pytest

from tests.netns.sides import is_on
from tests.netns.stage import HOST, HOST_TUNNEL, RELAY, SERVER

pytestmark = pytest.mark.netns
REFUSED = "abort|reset|unreach|route|refused|denied"


async def xfrm(stage, *words):
    await stage.lab.host.run(["ip", "xfrm", "policy", *words])


@pytest.mark.parametrize("version", [4, 6])
async def test_what_a_policy_claims_is_refused_and_ends_and_nothing_else_does(stage, excluded, included, version):
    """The controls: before it comes and after it has gone, its family's other; and an app of the other side."""
    bits = {4: 32, 6: 128}[version]
    selector = ("src", f"{HOST[version]}/{bits}", "dst", f"{SERVER[version]}/{bits}", "dir", "out")
    esp = ("tmpl", "src", str(HOST[version]), "dst", str(RELAY[version]), "proto", "esp", "mode", "tunnel")
    for app, side in ((excluded, "uplink"), (included, "tunnel")):
        assert await is_on(stage, app, side)
        for name, server in (("stream", version), ("other", 10 - version)):
            await app(f"{name} = tcp(SERVER{server}); line = read_line({name})")
    await excluded(f"dgram = udp(SERVER{version}); dgram.send(b'?'); dgram.recv(100)")
    await xfrm(stage, "add", *selector, *esp)
    stage.clear()
    for waiting in ("stream", "dgram"):
        with pytest.raises(OSError, match=REFUSED):
            await excluded(f"{waiting}.send(b'claimed'); [{waiting}.recv(1) for _ in range(9)]")
    for protocol in ("tcp", "udp"):
        with pytest.raises(OSError, match=REFUSED):
            await excluded(f"ask('{protocol}', SERVER{version})")
        assert str(HOST[10 - version]) == await excluded(f"ask('{protocol}', SERVER{10 - version})")
        assert str(RELAY[version]) == await included(f"ask('{protocol}', SERVER{version})")
    await excluded("other.send(b'goes on')")
    await included("stream.send(b'goes on')")
    assert set() == await stage.where(payload=b"claimed")
    seen = stage.lab.uplink.seen(destination=SERVER[version])
    assert [] == [one for one in seen if one.direction == "out" and not one.is_reset]
    assert {"uplink", "tunnel"} == await stage.where(payload=b"goes on")

    await xfrm(stage, "delete", *selector)
    assert await is_on(stage, excluded, "uplink")


async def test_policies_of_the_tunnels_own_address_are_none_of_the_uplinks(stage, excluded):
    """As a VPN's that sends all that has its address through IPsec."""
    everywhere = {4: "0.0.0.0/0", 6: "::/0"}
    for version, bits in ((4, 32), (6, 128)):
        await xfrm(stage, "add", "src", f"{HOST_TUNNEL[version]}/{bits}", "dst", everywhere[version], "dir", "out",
                   "tmpl", "proto", "esp", "mode", "transport")  # fmt: skip
    assert await is_on(stage, excluded, "uplink")
