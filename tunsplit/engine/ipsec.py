"""Which flows a policy of IPsec claims: they are to be encrypted, or not to leave at all."""

from collections.abc import Sequence
from ipaddress import ip_address

from tunsplit.engine.direction import destination_of, source_of
from tunsplit.host import IpsecPolicy
from tunsplit.wire.ip import TCP, UDP


def demands(policies: Sequence[IpsecPolicy], protocol: int, outside: bytes, device: int) -> bool:
    """Whether what leaves by this device with this four-tuple may not do so as it is.

    Args:
        policies: the first that counts first.
        protocol: its number.
        outside: the four-tuple, as it leaves.
        device: its index.
    """
    source, destination = ip_address(source_of(outside)), ip_address(destination_of(outside))
    port = int.from_bytes(outside[-2:], "big") if protocol in (TCP, UDP) else 0
    for one in policies:
        if (
            source in one.source
            and destination in one.destination
            and one.protocol in (0, protocol)
            and one.device in (0, device)
            and not (one.port ^ port) & one.port_mask
        ):
            return one.demands
    return False
