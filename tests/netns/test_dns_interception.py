"""L17, L32: what apps ask at port 53 goes by the table, wherever they address it."""

import pytest

from tests.netns.questions import ASKING
from tests.netns.stage import ROUTER
from tunsplit.lab.addresses import PUBLIC_RESOLVER, RELAY_RESOLVER

PROTOCOLS = pytest.mark.parametrize("protocol", ["udp", "tcp"])
VERSIONS = pytest.mark.parametrize("version", [4, 6])
APPS = pytest.mark.parametrize("name", ["excluded", "included"])
NOWHERE = {4: "203.0.113.253", 6: "2001:db8:113::253"}


@pytest.fixture
async def app(stage, name):
    async with stage.app(getattr(stage, name)) as started:
        await started(ASKING)
        yield started


@APPS
@VERSIONS
@PROTOCOLS
async def test_by_default_everybody_asks_the_relay_in_the_tunnel(stage, app, version, protocol):
    """Whichever resolver is addressed: a public one, the router's, or nobody."""
    for asked in (PUBLIC_RESOLVER[version], ROUTER[version], NOWHERE[version], RELAY_RESOLVER[version]):
        stage.clear()
        assert "relay" == await app("who(asked, protocol)", asked=str(asked), protocol=protocol)
        assert "uplink" not in await stage.where(port=53)
    assert "tunnel" in await stage.where(port=53) or await stage.counter("dns_cached")
