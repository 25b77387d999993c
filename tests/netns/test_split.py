"""Who leaves by which side (L1, L8, L12): both wires are watched, and the server says whom it saw."""

import json
import shutil
from pathlib import Path

import pytest

from tests.netns.stage import HOST, RELAY, SERVER, open_stage, start_app, until, where

pytestmark = pytest.mark.netns

ALL = [(protocol, version) for protocol in ("tcp", "udp", "echo") for version in (4, 6)]


async def ask_all(app, look):
    """Ask the server in every way; where that was seen, and from which address."""
    outcome = {}
    for protocol, version in ALL:
        seen = await app(f"ask('{protocol}', SERVER{version})")
        outcome[protocol, version] = await look(address=SERVER[version]), seen
    return outcome


def expected(side, own):
    return {(protocol, version): ({side}, "" if protocol == "echo" else str(own[version])) for protocol, version in ALL}


async def test_an_excluded_app_is_on_the_uplink_only(stage, excluded):
    """L1, L8, L12: TCP, UDP and echo, IPv4 and IPv6."""
    assert expected("uplink", HOST) == await ask_all(excluded, stage.where)


async def test_an_included_app_is_in_the_tunnel_only(stage, included):
    """L1, L8, L12."""
    assert expected("tunnel", RELAY) == await ask_all(included, stage.where)


async def test_without_tunsplit_the_same_app_is_on_the_uplink(lab):
    """The control: it is tunsplit that sends it into the tunnel."""
    async with start_app(lab.host, lab.copy_program("python", "included")) as app:
        assert expected("uplink", HOST) == await ask_all(app, lambda **wanted: where(lab, **wanted))


async def test_the_ways_do_not_mix_when_both_talk_at_once(stage, excluded, included):
    """L1: to the same server, from the same port, at the same time."""
    for version in (4, 6):
        await excluded(f"own = tcp(SERVER{version}); line = read_line(own)")
        await included(f"own = tcp(SERVER{version}); line = read_line(own)")
        await excluded("own.send(b'from the excluded one')")
        await included("own.send(b'from the included one')")
        assert b"from the excluded one" == await excluded("read_exactly(own, 21)")
        assert b"from the included one" == await included("read_exactly(own, 21)")

    assert {"uplink"} == await stage.where(payload=b"from the excluded one")
    assert {"tunnel"} == await stage.where(payload=b"from the included one")


async def test_a_glob_excludes_what_it_matches_and_nothing_else(lab):
    """SPEC.md, "Splitting rules": `*` stays within a directory, `**` does not."""
    deep = lab.directory / "games/deep"
    deep.mkdir(parents=True)
    async with open_stage(lab, [f"{lab.directory}/games/**", f"{lab.directory}/bin/exc*"]) as stage:
        game = Path(shutil.copy(stage.included, deep / "game"))
        shutil.copy(stage.included.parent / "pyvenv.cfg", deep)
        seen = {}
        for program in (game, stage.excluded, stage.included):
            async with stage.app(program) as app:
                await app("ask('tcp', SERVER4)")
            seen[program.name] = await stage.where(address=SERVER[4])
            stage.clear()

    assert {"game": {"uplink"}, "excluded": {"uplink"}, "included": {"tunnel"}} == seen


async def test_children_of_an_excluded_app_are_excluded_whatever_they_are(lab):
    """L4: a script that an excluded shell runs, and the program that the script runs."""
    shell = lab.copy_program("sh", "excluded-shell")
    async with open_stage(lab, [shell]) as stage:
        script = lab.directory / "script"
        script.write_text(f"#!{shell}\ncurl -sS --max-time 5 {lab.url(4)}\ncurl -sS --max-time 5 {lab.url(6)}\n")
        script.chmod(0o755)
        done = await lab.host.run([script])
        assert [str(HOST[4]), str(HOST[6])] == done.stdout.split()
        assert {"uplink"} == await stage.where(protocol="tcp", address=SERVER[4])
        assert {"uplink"} == await stage.where(protocol="tcp", address=SERVER[6])
        stage.clear()

        done = await lab.host.run(["sh", "-c", f"curl -sS --max-time 5 {lab.url(4)}; true"])
        assert [str(RELAY[4])] == done.stdout.split()
        assert {"tunnel"} == await stage.where(protocol="tcp", address=SERVER[4])


async def test_a_child_of_another_program_names_its_ancestor(stage, excluded):
    """L4: `reason` says from whom it was inherited."""
    await excluded(
        "child = subprocess.Popen([included, '-I', '-S', '-c', told], stdout=subprocess.PIPE, stdin=subprocess.PIPE);"
        "child.stdout.readline()",
        included=str(stage.included),
        told="import socket, sys; own = socket.create_connection(('198.51.100.1', 7))\n"
        "print(own.recv(100), flush=True); sys.stdin.read()",
    )
    (flow,) = await stage.daemon.flows()
    await excluded("child.communicate()")

    assert (str(stage.included), "uplink") == (flow["app"]["exe"], flow["verdict"])
    assert f"inherited from {excluded.pid} ({stage.excluded})" in flow["reason"]
    assert {"uplink"} == await stage.where(protocol="tcp", address=SERVER[4])


async def test_in_mode_include_the_listed_app_is_in_the_tunnel_and_all_others_are_not(lab):
    """SPEC.md, "Splitting rules"."""
    async with (
        open_stage(lab, split={"mode": "include"}) as stage,
        stage.app(stage.excluded) as listed,
        stage.app(stage.included) as other,
    ):
        assert str(RELAY[4]) == await listed("ask('tcp', SERVER4)")
        assert {"tunnel"} == await stage.where(address=SERVER[4])
        stage.clear()
        assert str(HOST[4]) == await other("ask('tcp', SERVER4)")
        assert {"uplink"} == await stage.where(address=SERVER[4])


async def test_switched_off_splitting_sends_every_app_into_the_tunnel(lab):
    """L18."""
    async with open_stage(lab, split={"enabled": False}) as stage, stage.app(stage.excluded) as app:
        assert str(RELAY[4]) == await app("ask('tcp', SERVER4)")
        assert {"tunnel"} == await stage.where(address=SERVER[4])
        assert "disabled" == (await stage.daemon.status())["state"]


# A raw packet has a sender, but no socket with its port: a UDP datagram from port 4444 to the server's echo.
NOBODYS = """
head = struct.pack('!BBHHHBBH4s4s', 0x45, 0, 34, 0, 0, 64, 17, 0, bytes(4), socket.inet_aton(SERVER4))
with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as own:
    own.sendto(head + struct.pack('!HHHH', 4444, 7, 14, 0) + b'nobody', (SERVER4, 0))
"""


@pytest.mark.parametrize(("unattributed", "sides"), [("block", set()), ("tunnel", {"tunnel"}), ("uplink", {"uplink"})])
async def test_what_has_no_owner_gets_the_configured_verdict_and_is_visible(lab, unattributed, sides):
    """L13."""
    async with open_stage(lab, split={"unattributed": unattributed}) as stage, stage.app(stage.excluded) as app:
        await app(NOBODYS)

        async def flows():
            return [flow for flow in await stage.daemon.flows() if flow["source"].endswith(":4444")]

        (flow,) = await until(flows, "the flow is shown")
        assert (unattributed, "unattributed") == (flow["verdict"], flow["reason"])
        assert sides == await stage.where(payload=b"nobody")


async def test_a_running_iperf3_is_named_with_its_side(lab):
    """Issue, "Done when"."""
    iperf3 = lab.copy_program("iperf3", "excluded-iperf3")
    async with open_stage(lab, [iperf3]) as stage, lab.iperf_server() as server:
        command = [str(iperf3), "-c", str(SERVER[6]), "-t", "30", "-b", "1M"]
        async with lab.host.start(command) as running:
            await server.wait_written("Accepted connection")
            await server.wait_written("connected to")
            flows = [flow for flow in await stage.daemon.flows() if flow["app"]["pid"] == running.pid]

    assert 2 == len(flows)  # control and data
    for flow in flows:
        assert (str(iperf3), "uplink", "open", "tcp") == (
            flow["app"]["exe"], flow["verdict"], flow["state"], flow["protocol"]
        )  # fmt: skip
        assert f"[{SERVER[6]}]:5201" == flow["destination"]
        assert flow["nat"].startswith(f"[{HOST[6]}]:")
        assert json.dumps(flow)
