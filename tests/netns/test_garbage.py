"""Garbage from everywhere changes nothing: it is counted, never raised, and costs no memory (SPEC, "Robustness").

Root writes it into the tun, the router onto the uplink, the relay into the tunnel, as fast as they can, while both
apps' flows go on.
"""

import random
from pathlib import Path

import pytest
import trio

from tests import craft
from tests.netns.sides import is_on
from tests.netns.stage import HOST, HOST_TUNNEL, SERVER, TUN, start_app

pytestmark = pytest.mark.netns

PACKETS = 1500  # a place and round
MOST_GROWTH = 8 << 20  # bytes; what is held of fragments alone may be 4 MiB a direction
TUN4, TUN6 = "10.128.0.1", "2001:2:0:5::1"
SIDES = ("excluded", "included")

# Sends the packets of a file, each behind its length; what the kernel itself refuses is no garbage that we could get.
POUR = """
def pour(device, file, link):
    sent, at = 0, 0
    with open(file, 'rb') as read:
        data = read.read()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as own:
        own.bind((device, 0))
        while at < len(data):
            size = int.from_bytes(data[at:at + 2], 'big')
            packet, at = data[at + 2:at + 2 + size], at + 2 + size
            ethertype = 0x86dd if packet[0] >> 4 == 6 else 0x0800
            frame = bytes.fromhex(link) + ethertype.to_bytes(2, 'big') + packet if link else packet
            with contextlib.suppress(OSError):
                own.sendto(frame, (device, ethertype))
                sent += 1
    return sent
"""
TALK = """
def talk(rounds):
    for number in range(rounds):
        said = b'%d' % number
        stream.sendall(said)
        assert said == read_exactly(stream, len(said))
        with contextlib.suppress(OSError):  # lost in the flood, or refused by what is forged in the server's name
            datagrams.send(said)
            datagrams.recv(2000)
"""


def valid(source4, source6, nonce: bytes, port: int = 6000) -> list[bytes]:
    """Packets of every kind to the server, and to nobody."""
    ends4 = f"{source4}:{port} > {SERVER[4]}:7"
    ends6 = f"[{source6}]:{port} > [{SERVER[6]}]:7"
    found = []
    for ends, source, to in ((ends4, source4, SERVER[4]), (ends6, source6, SERVER[6])):
        packet = craft.udp(ends, nonce * 20)
        found += [packet, craft.tcp(ends, nonce, flags=craft.SYN), craft.echo(f"{source} > {to}", port, nonce)]
        found += craft.fragments(packet, 16)
        found.append(craft.error(f"{source} > {to}", packet, 3 if "." in str(source) else 1, 4))
        found.append(craft.transport(f"{source} > {to}", craft.DCCP, bytes(12) + nonce))
        found.append(craft.transport(f"{source} > {to}", craft.GRE, nonce))
    return found


def turned(packets: list[bytes]) -> list[bytes]:
    """The same from the server: addresses turned round, which no checksum notices."""
    return [
        packet[:12] + packet[16:20] + packet[12:16] + packet[20:]
        if packet[0] >> 4 == 4
        else packet[:8] + packet[24:40] + packet[8:24] + packet[40:]
        for packet in packets
    ]


def bent(packets: list[bytes], chance: random.Random, *, keep: bool) -> bytes:
    """A file of many, most of them damaged; `keep`: not in what a tunnel finds its peer by."""
    found = []
    for _ in range(PACKETS):
        packet = bytearray(chance.choice(packets))
        kept = (20 if packet[0] >> 4 == 4 else 40) if keep else 0
        for _ in range(chance.randrange(5)):
            at = chance.randrange(kept, len(packet))
            packet[at] = chance.randrange(256)
        if chance.random() < 0.3 and not keep:
            packet = packet[: chance.randrange(1, len(packet))]
        found.append(len(packet).to_bytes(2, "big") + bytes(packet))
    return b"".join(found)


def resident(pid: int) -> int:
    """A process's resident memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


async def test_flows_go_on_through_garbage_from_everywhere(lab, stage, excluded, included, tmp_path):
    """Root may send as anybody, the others as the server; what they send for nobody shows on neither side."""
    for app in (excluded, included):
        await app("stream = tcp(SERVER4); read_line(stream); datagrams = udp(SERVER6); datagrams.settimeout(0.3)")
        await app(TALK)
        await app("talk(3)")
    flows = {flow["source"]: flow for flow in await stage.daemon.flows()}
    ports = [int(flow["nat"].rpartition(":")[2]) for flow in flows.values()]
    mac = (await stage.mac()).hex() + "020000000099"
    chance = random.Random(1)
    places = {
        "tun": (lab.host, TUN, "", valid(TUN4, TUN6, b"into the tun")),
        "uplink": (lab.router, "lan0", mac, turned(valid(HOST[4], HOST[6], b"by router"))),
        "tunnel": (lab.relay, "wg0", "", turned(valid(HOST_TUNNEL[4], HOST_TUNNEL[6], b"by relay"))),
    }
    for port in ports:
        places["uplink"][3].extend(turned(valid(HOST[4], HOST[6], b"by router", port)))
        places["tunnel"][3].extend(turned(valid(HOST_TUNNEL[4], HOST_TUNNEL[6], b"by relay", port)))

    program = lab.copy_program("python", "garbage")
    sizes = []
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            for name, (namespace, device, link, packets) in places.items():
                file = tmp_path / name
                file.write_bytes(bent(packets, chance, keep=name == "tunnel"))
                nursery.start_soon(poured, namespace, program, device, file, link)
            for app in (excluded, included):
                nursery.start_soon(app, "talk(20)")
        sizes.append(resident(stage.daemon.pid))

    assert sizes[-1] - sizes[0] < MOST_GROWTH
    counters = (await stage.daemon.status())["counters"]
    assert {} == {name: count for name, count in counters.items() if name.startswith("failed_")}
    assert counters["malformed"] > PACKETS / 10
    assert counters["inbound_no_flow"] > PACKETS / 10
    assert set() == await stage.where(payload=b"into the tun")
    assert {"uplink"} == await stage.where(payload=b"by router")  # the control: it would have been seen
    assert not [seen for seen in lab.tunnel.seen(payload=b"by router") if seen.direction == "out"]
    assert [] == lab.uplink.seen(payload=b"by relay")
    assert set(flows) <= {flow["source"] for flow in await stage.daemon.flows()}
    assert await is_on(stage, excluded, "uplink")
    assert await is_on(stage, included, "tunnel")


async def poured(namespace, program, device, file, link):
    """All of a file has been sent by a device."""
    async with start_app(namespace, program) as app:
        await app(POUR)
        assert PACKETS / 2 < await app("pour(device, file, link)", device=device, file=str(file), link=link)
