"""The internet checksum (RFC 1071) and how it moves when bytes change (RFC 1624).

Ones' complement arithmetic on 16 bits is arithmetic modulo 0xFFFF: a finished checksum is the
negative of the sum, so it falls by what the bytes rise; an unfinished one (the pseudo-header's plain
sum that checksum offloading leaves in the field) rises with them.
"""


def internet_checksum(data: bytes | bytearray | memoryview) -> int:
    """The checksum of `data` (RFC 1071). Since 2**16 ≡ 1 (mod 0xFFFF), the folded sum is a remainder."""
    value = int.from_bytes(data, "big")
    return -(value << 8 if len(data) & 1 else value) % 0xFFFF


def checksum_delta(old: bytes, new: bytes) -> int:
    """What to subtract from a finished checksum when `new` replaces `old` (RFC 1624); both of one even length."""
    return (int.from_bytes(new, "big") - int.from_bytes(old, "big")) % 0xFFFF


def pseudo_header(addresses: bytes, protocol: int, length: int) -> bytes:
    """The pseudo-header of RFC 9293 §3.1 or RFC 8200 §8.1; `addresses`: 8 or 32 bytes, `length`: of the payload."""
    if len(addresses) == 8:
        return addresses + bytes((0, protocol)) + length.to_bytes(2, "big")
    return addresses + length.to_bytes(4, "big") + bytes((0, 0, 0, protocol))
