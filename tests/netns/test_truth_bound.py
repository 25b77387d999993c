"""Binding does not move an app (L10): Mullvad's st1; nor does a name that it asks for (L17): st4."""

import pytest

from tests.netns.questions import ASKING, NAME
from tests.netns.stage import HOST, HOST_TUNNEL, RELAY, SERVER, open_stage
from tunsplit.lab.addresses import SYSTEM_RESOLVER

pytestmark = pytest.mark.netns

SEES = """
def sees(protocol, address, source):
    with (tcp if protocol == 'tcp' else udp)(address, 7, source) as own:
        own.send(b'still here')
        line = read_line(own) if protocol == 'tcp' else own.recv(2048).split(b'\\n')[0].decode()
        assert protocol == 'udp' or read_exactly(own, 10) == b'still here'
        return line.split()[0]
"""


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", ["tcp", "udp"])
async def test_the_server_sees_an_apps_own_side_whatever_it_is_bound_to(stage, excluded, included, protocol, version):
    """L10, st1: bound to the tunnel's address, to the LAN's, to none; and the included app's mirror."""
    for app, side, seen in ((excluded, "uplink", HOST), (included, "tunnel", RELAY)):
        await app(SEES)
        for source in (str(HOST_TUNNEL[version]), str(HOST[version]), ""):
            stage.clear()
            told = await app(f"sees(protocol, SERVER{version}, source)", protocol=protocol, source=source)
            assert str(seen[version]) == told
            assert {side} == await stage.where(payload=b"still here")
            assert {side} == await stage.where(address=SERVER[version])


@pytest.mark.parametrize(("platform", "side"), [("android", "uplink"), ("per-app", "uplink"), ("windows", "tunnel")])
async def test_an_excluded_apps_questions_are_seen_where_the_platform_has_them(lab, platform, side):
    """L17, st4: three of them; on Windows the limitation that Mullvad's test documents, which is the control."""
    dns = {"platform": platform, "system": [str(SYSTEM_RESOLVER[4])]}
    async with open_stage(lab, dns=dns) as stage, stage.app(stage.excluded) as app:
        await app(ASKING)
        stage.clear()
        for number in range(3):
            await app(f"own = udp('192.0.2.53', 53); own.send(question(name='{number}.who.is', kind=1)); own.recv(512)")
        assert {side} == await stage.where(port=53)
        asked = [one for one in getattr(lab, side).seen("udp", payload=NAME, port=53) if one.direction == "out"]
        assert 3 == len(asked)
