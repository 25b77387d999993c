"""L2, L3 for questions: what an app has asked on its old side is not answered when it is switched."""

import pytest

from tests.netns.questions import ASKING, NAME
from tests.netns.stage import open_stage
from tunsplit.lab.addresses import PUBLIC_RESOLVER

PROTOCOLS = pytest.mark.parametrize("protocol", ["udp", "tcp"])
PUBLIC = {"custom": [str(PUBLIC_RESOLVER[4])]}
# Nobody answers there, so a question stays in flight for seconds.
SILENT = {"custom": ["203.0.113.200"]}


@PROTOCOLS
async def test_a_switched_app_asks_on_its_new_side(lab, protocol):
    async with open_stage(lab, dns=PUBLIC) as stage, stage.app(stage.included) as app:
        await app(ASKING)
        for command, side in (("add", "uplink"), ("remove", "tunnel")):
            await stage.daemon.command("app", command, str(stage.included))
            stage.clear()
            assert "public" == await app("who('192.0.2.53', protocol)", protocol=protocol)
            assert {side} == await stage.where(payload=NAME)


async def test_what_was_asked_before_a_switch_is_not_answered_after_it(lab):
    """The socket hears of it, the answer to come does not reach it."""
    async with open_stage(lab, dns=SILENT) as stage, stage.app(stage.included) as app:
        await app(ASKING)
        await app("own = udp('192.0.2.53', 53); own.send(question())")
        assert (await stage.flow_of(app))["destination"] == "192.0.2.53:53"
        await stage.daemon.command("app", "add", str(stage.included))
        with pytest.raises(ConnectionAbortedError):
            await app("own.recv(4096)")
        with pytest.raises(TimeoutError):
            await app("own.settimeout(6); own.recv(4096)")  # longer than the proxy waits for its resolvers
        assert 1 == await stage.counter("dns_answers_late")


async def test_a_connection_with_questions_ends_with_a_switch(lab):
    async with open_stage(lab, dns=SILENT) as stage, stage.app(stage.included) as app:
        await app(ASKING)
        await app("own = tcp('192.0.2.53', 53); own.sendall(framed(question()))")
        await stage.daemon.command("app", "add", str(stage.included))
        with pytest.raises(ConnectionError):
            await app("unframed(own)")
