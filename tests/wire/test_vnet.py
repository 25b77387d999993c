"""The virtio header, and how it moves with an Ethernet header in front."""

import struct

import pytest

from tunsplit.wire import vnet

TSO = struct.pack("<BBHHHH", vnet.NEEDS_CSUM, 1, 54, 1448, 34, 16)  # VIRTIO_NET_HDR_GSO_TCPV4 on Ethernet


def test_what_counts_from_the_start_of_the_frame_moves():
    header = bytearray(TSO)

    vnet.shift(header, -14)
    assert struct.pack("<BBHHHH", vnet.NEEDS_CSUM, 1, 40, 1448, 20, 16) == header
    vnet.shift(header, 14)
    assert header == TSO


def test_a_header_without_offloads_stays_as_it_is():
    header = bytearray(vnet.NONE)

    vnet.shift(header, 14)
    assert vnet.NONE == header


def test_it_moves_to_another_place():
    frame = bytearray(TSO + bytes(14))

    vnet.move(frame, 0, frame, 14, -14)
    assert (TSO, 40, 20) == (frame[:10], *struct.unpack_from("<2xH2xH", frame, 14))


@pytest.mark.parametrize("by", [-14, 14])
def test_absurd_values_stop_at_their_field(by):
    header = bytearray(struct.pack("<BBHHHH", vnet.NEEDS_CSUM, 1, *((0,) * 4 if by < 0 else (0xFFFF,) * 4)))

    vnet.shift(header, by)
    assert (0 if by < 0 else 0xFFFF,) * 2 == struct.unpack_from("<2xH2xH", header)
