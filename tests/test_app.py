"""The daemon as a whole, entered inside a network namespace: what it makes, and that all of it goes."""

from contextlib import contextmanager
from socket import AF_INET, SOCK_DGRAM, socket

import pytest
import trio
import trio.testing

from tests.hosts import FAR4, FAR6, FWMARK, TUNNEL, UPLINK, open_host, run
from tunsplit import app
from tunsplit.app import open_daemon
from tunsplit.config.schema import Config, Control, Firewall, Tun, Tunnel
from tunsplit.errors import KernelError, TunsplitError
from tunsplit.kernel import hostconfig, nft
from tunsplit.kernel.instance import Instance
from tunsplit.kernel.procevents import ProcessEvents
from tunsplit.tasks.halfopen import HalfOpen
from tunsplit.tasks.judge import Judge
from tunsplit.tasks.network import Network

NAME = "ts-app"


def a_config(path="/nonexistent", **others):
    return Config(
        tunnel=Tunnel(interface=TUNNEL, fwmark=FWMARK), tun=Tun(name=NAME), control=Control(socket=str(path)), **others
    )


@pytest.mark.parametrize("here", [True, False])
def test_the_way_back_to_process_events_is_kept_only_where_it_is_one(monkeypatch, here):
    kept: set[str] = set()
    monkeypatch.setattr(app, "is_initial_network", lambda: here)
    monkeypatch.setattr(app, "keep_only", lambda capabilities: kept.update(one.name for one in capabilities))
    app._give_up_rights()  # noqa: SLF001  # nobody else decides that, and for good

    assert here is not ("CAP_SYS_ADMIN" in kept)
    assert {"CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_SYS_PTRACE"} <= kept


@pytest.fixture
def host():
    with open_host() as made:
        yield made


@pytest.fixture
def config(tmp_path):
    return a_config(tmp_path / "control.sock")


@contextmanager
def nothing_left(host):
    """The host is afterwards as it was before, to the byte."""
    before = host.state()
    yield
    assert before == host.state()
    assert not Instance.is_running()


@pytest.mark.netns
async def test_what_it_makes_goes_when_it_is_left(host, config):
    with nothing_left(host):
        async with open_daemon(config) as (report, *_):
            assert "active" == report.status()["state"]
            assert Instance.is_running()
            assert NAME == host.way(FAR4)
            assert NAME == host.way(FAR6)


@pytest.mark.netns
async def test_a_second_one_is_refused(host, config):
    with nothing_left(host):
        async with open_daemon(config):
            with pytest.raises(TunsplitError, match="another tunsplit is at work"):
                async with open_daemon(config):
                    pass


@pytest.mark.netns
async def test_what_goes_wrong_inside_comes_out_as_it_is(host, config):
    with nothing_left(host), pytest.raises(ZeroDivisionError):
        async with open_daemon(config):
            raise ZeroDivisionError


@pytest.mark.netns
async def test_where_a_stop_is_to_close_so_does_an_error(host, config):
    closed = config.replaced(firewall=Firewall(on_stop="block"))
    with nothing_left(host):
        with pytest.raises(ZeroDivisionError):
            async with open_daemon(closed):
                raise ZeroDivisionError
        assert ["closed", "closed"] == [host.way(FAR4), host.way(FAR6)]
        assert nft.listing()
        hostconfig.undo()


async def fail_twice(config):
    async def fail():
        raise ZeroDivisionError

    async with open_daemon(config), trio.open_nursery() as nursery:
        nursery.start_soon(fail)
        raise KeyError


@pytest.mark.netns
async def test_several_errors_come_out_together(host, config):
    with nothing_left(host):
        with pytest.raises(BaseExceptionGroup) as failure:
            await fail_twice(config)
        assert failure.group_contains(ZeroDivisionError)


STEPS = (
    "Instance", "Rtnetlink", "RtnetlinkEvents", "LivePorts", "SockDiag", "Conntrack", "Processes", "Nat",
    "PortChoice", "Tun", "Network", "SlowPath", "SocketSource", "Admit", "Report",
)  # fmt: skip


def refuse(*_, **__):
    raise KernelError("no more")


@pytest.mark.netns
@pytest.mark.parametrize("step", STEPS)
async def test_a_step_that_fails_leaves_nothing(host, config, monkeypatch, step):
    failing = type("Failing", (), {"acquire": refuse}) if step == "Instance" else refuse
    monkeypatch.setattr(app, step, failing)
    with nothing_left(host), pytest.raises(KernelError, match="no more"):
        async with open_daemon(config):
            pass


@pytest.mark.netns
@pytest.mark.parametrize(
    "place",
    [
        "tunsplit.kernel.nft.apply",
        "tunsplit.kernel.hostconfig.HostConfig._apply_tun",
        "tunsplit.kernel.hostconfig.HostConfig._apply_routes",
        "tunsplit.kernel.hostconfig.HostConfig._apply_rules",
        "tunsplit.kernel.rtnetlink.Rtnetlink.neighbours",
        "tunsplit.tasks.control.open_listener",
    ],
)
async def test_nor_does_one_in_the_middle_of_steering(host, config, monkeypatch, place):
    with nothing_left(host), monkeypatch.context() as patch:
        patch.setattr(place, refuse)
        if place.endswith("neighbours"):  # which taking away asks for too
            patch.setattr(place, first_then(refuse, lambda *_: []))
        with pytest.raises(KernelError, match="no more"):
            async with open_daemon(config):
                pass


def first_then(first, then):
    calls = []

    def either(*arguments):
        calls.append(arguments)
        return first() if len(calls) == 1 else then(*arguments)

    return either


@pytest.mark.netns
async def test_a_mistake_of_ours_does_not_open_the_way(host, config, monkeypatch):
    """L15: as if it had been killed; only a signal says that the way may be open."""
    ready = trio.Event()

    async def fail(_, task_status):
        task_status.started()
        await ready.wait()
        raise ZeroDivisionError

    monkeypatch.setattr("tunsplit.tasks.dns.Dns.run", fail)
    monkeypatch.setattr(app, "keep_only", lambda _: None)  # the tests' own rights
    with nothing_left(host):
        with pytest.raises(ZeroDivisionError):
            await app._run_until_signal(config, "", None, ready.set)  # noqa: SLF001 -- `run` makes a loop of its own
        assert ("closed", "closed") == (host.way(FAR4), host.way(FAR6))
        assert nft.listing()
        hostconfig.undo()


@pytest.mark.netns
async def test_a_taken_name_leaves_nothing_either(host, config):
    host.ip(f"link add {NAME} type bridge")
    with nothing_left(host), pytest.raises(KernelError, match=f"an interface called {NAME} exists already"):
        async with open_daemon(config):
            pass


@pytest.mark.netns
async def test_a_flushed_ruleset_is_put_back_by_itself(host, config):
    with nothing_left(host):
        async with open_daemon(config):
            nft.run("flush", "ruleset")
            with trio.fail_after(5):
                while not nft.listing():  # noqa: ASYNC110 -- nft sets no trio.Event
                    await trio.sleep(0.02)


@pytest.mark.netns
async def test_news_of_processes_come_before_packets_also_once_they_are_subscribed_to_anew(host, config, monkeypatch):
    monkeypatch.setattr("tunsplit.tasks.judge.RETRY_S", 0.1)
    refusals, anew, heard = [KernelError("out of order")], [], []
    real_init, real_read, real_hear = ProcessEvents.__init__, ProcessEvents.read, Judge.hear

    def init(events):
        real_init(events)
        anew.append(events)

    def read(events):
        if refusals:
            raise refusals.pop()
        return real_read(events)

    def hear(judge):
        heard.append(judge)
        real_hear(judge)

    async with open_daemon(config):
        monkeypatch.setattr(ProcessEvents, "__init__", init)
        monkeypatch.setattr(ProcessEvents, "read", read)
        run("true")
        with trio.fail_after(20):
            while not anew:  # noqa: ASYNC110 -- nobody tells
                await trio.sleep(0.01)
            monkeypatch.setattr(Judge, "hear", hear)
            while not heard:
                run("true")
                with socket(AF_INET, SOCK_DGRAM) as sender:
                    sender.sendto(b"any", (FAR4, 9))
                await trio.sleep(0.01)


@pytest.mark.netns
async def test_a_removed_tun_is_made_anew_and_ends_nothing(host, config, caplog):
    async with open_daemon(config) as (report, *_):
        way = host.way(FAR4)
        run("ip", "link", "delete", NAME)
        assert "closed" == host.way(FAR4)
        with trio.fail_after(5):
            while host.way(FAR4) != way:  # noqa: ASYNC110 -- nor does rtnetlink
                await trio.sleep(0.02)
        assert ("active", 1) == (report.status()["state"], report.counters()["tun_renewals"])
    assert any("made anew" in record.message for record in caplog.records)


@pytest.mark.netns
@pytest.mark.parametrize("change", ["add", "delete"])
async def test_who_is_told_of_ended_connections_is_forgotten_when_the_network_changes(
    host, config, monkeypatch, change
):
    """With the word of a loss already, before a look at what is left; and with a change that takes nothing away."""
    host.ip(f"address add 192.168.50.3/24 dev {UPLINK}")
    forgotten: list[float] = []
    monkeypatch.setattr(HalfOpen, "clear", lambda _: forgotten.append(trio.current_time()))
    async with open_daemon(config):
        if change == "delete":
            monkeypatch.setattr(Network, "_look_again", lambda _: None)
        number, before = {"add": 4, "delete": 3}[change], len(forgotten)
        host.ip(f"address {change} 192.168.50.{number}/24 dev {UPLINK}")
        with trio.fail_after(5):
            while before == len(forgotten):  # noqa: ASYNC110 -- nor does rtnetlink
                await trio.sleep(0.02)


@pytest.mark.netns
async def test_sides_that_come_and_go_leave_nothing_behind(host, config, monkeypatch):
    seen = []

    async def expire(_, __, fragments, *___):
        seen.append(fragments)

    monkeypatch.setattr("tunsplit.tasks.expiry.expire", expire)
    async with open_daemon(config) as (report, *_):
        for _ in range(3):
            host.ip(f"link set {TUNNEL} down")
            await settled(report, up=False)
            host.ip(f"link set {TUNNEL} up")
            await settled(report, up=True)
        await trio.testing.wait_all_tasks_blocked(0.02)

        outbound, forwarded, pump, _ = seen[0]
        assert 2 == len(pump._back)  # noqa: SLF001  # uplink, tunnel: what would pile up
        assert 0 == outbound.expire(0.0) + forwarded.expire(0.0)


async def settled(report, *, up):
    with trio.fail_after(5):
        while report.status()["tunnel"]["up"] is not up:  # noqa: ASYNC110 -- nor does rtnetlink
            await trio.sleep(0.01)


@pytest.mark.netns
async def test_it_answers_on_its_socket(host, config):
    with nothing_left(host):
        async with open_daemon(config), await trio.open_unix_socket(config.control.socket) as stream:
            await stream.send_all(b'{"verb": "status"}\n')
            assert b'"state":"active"' in await stream.receive_some()
