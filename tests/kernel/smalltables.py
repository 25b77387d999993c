"""Small tables of ours, of both families, to put up in a test; and what one of their sets holds."""

from ipaddress import ip_address

from tests.hosts import run
from tunsplit.kernel import nft

SET = "set nat_tcp {\n type inet_service\n flags dynamic\n}\n"
BODIES = {
    "inet": SET + 'counter seen {\n}\nchain c {\n return comment "a b"\n}\n',
    "arp": "chain c {\n}\n",
}

NEAR = "set near{0} {{\n type ipv{0}_addr\n}}\n"
WITH_SETS = {"inet": NEAR.format(6), "arp": NEAR.format(4)}
SETS = {"inet": {"near6": (ip_address("fd64::2"),)}, "arp": {"near4": (ip_address("10.64.0.2"),)}}


def elements() -> list[int]:
    """The ports in `nat_tcp`, in order."""
    listed = run("nft", "list", "set", *nft.MAIN.split(), "nat_tcp")
    if "elements" not in listed:
        return []
    inside = listed.split("elements = {")[1].split("}")[0]
    return sorted(int(port) for port in inside.split(","))
