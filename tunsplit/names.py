"""Names and numbers by which everything of ours on a host is recognised.

They are fixed, so that `tunsplit undo` needs no journal: what carries them is ours, in the network
namespace it is found in, and goes with it.
"""

ROUTE_PROTOCOL = 117  # rtnetlink's rtm_protocol and FRA_PROTOCOL of every route and rule of ours
NFT_TABLE = "tunsplit"  # family inet

# Routing tables.
TABLE_TUN = 7500  # default into the tun, and under it unreachable
TABLE_UPLINK = 7501  # the uplink's own on-link prefixes, option 121 routes and default
TABLE_TUNNEL = 7502  # the tunnel's default
TABLE_LAN = 7503  # what included apps may reach beside the tunnel
TABLE_FORWARDED = 7504  # what this host forwards for others
TABLE_NAMED = 7505  # where a datagram that names a side's device passes for on its way, until it is steered
TABLES = (TABLE_TUN, TABLE_UPLINK, TABLE_TUNNEL, TABLE_LAN, TABLE_FORWARDED, TABLE_NAMED)

# Packet marks.
MARK_UPLINK = 0x7501  # our own sockets on the uplink; packets that came in there
MARK_TUNNEL = 0x7502
MARK_STEER = 0x7503  # packets that named a side's device without being bound to it: into the tun

# Priorities of the routing rules: one block, in this order, before everybody else's.
PRIORITY_MARKED = 75
PRIORITY_STEERED = 76
PRIORITY_TRANSPORT = 77
PRIORITY_DHCP = 78
PRIORITY_DNS = 79
PRIORITY_LAN = 80
PRIORITY_TUN = 81
PRIORITY_NAMED = 82
PRIORITY_FORWARDED = 83
PRIORITY_UNREACHABLE = 84

# NAT's ports and echo identifiers (the dynamic range of RFC 6335 §6).
NAT_FIRST, NAT_LAST = 49152, 65535
