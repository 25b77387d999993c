"""Loopback is nobody's side (L9): Mullvad's st6."""

import pytest

from tests.netns.stage import HOST

pytestmark = pytest.mark.netns

KINDS = {4: ("socket.AF_INET", "127.0.0.1"), 6: ("socket.AF_INET6", "::1")}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("to", ["loopback", "its own address"])
async def test_an_excluded_server_and_an_included_client_meet_on_the_host(stage, excluded, included, version, to):
    """L9, st6: TCP and UDP; each sees the other's address as it is, no wire sees anything, and tunsplit no flow."""
    kind, loopback = KINDS[version]
    address = loopback if to == "loopback" else str(HOST[version])
    await excluded(
        f"server = socket.create_server((address, 5050), family={kind})\n"
        f"datagrams = socket.socket({kind}, socket.SOCK_DGRAM); datagrams.bind((address, 5050))",
        address=address,
    )
    await included("own = tcp(address, 5050); own.sendall(b'over the stream')", address=address)
    await included("other = udp(address, 5050); other.send(b'by datagram')")
    await excluded("accepted, peer = server.accept(); accepted.settimeout(3)")
    assert b"over the stream" == await excluded("accepted.recv(100)")
    assert [address, address] == [await excluded("peer[0]"), await excluded("accepted.getsockname()[0]")]
    data, peer = await excluded("[datagrams.recvfrom(100)[0], peer[0]]")
    assert (b"by datagram", address) == (data, peer)
    assert address == await included("own.getsockname()[0]")

    for verb in ("add", "remove"):  # a switch has nothing to end here
        await stage.daemon.command("app", verb, str(stage.included))
        await excluded("accepted.sendall(b'and back')")
        assert b"and back" == await included("read_exactly(own, 8)")
    assert set() == await stage.where(payload=b"over the stream")
    assert set() == await stage.where(payload=b"by datagram")
    assert set() == await stage.where(protocol="tcp", address=HOST[version])
    assert [] == await stage.daemon.flows()
