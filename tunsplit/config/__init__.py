"""The configuration: TOML text in, frozen structs out. Opens no file, looks nothing up.

`schema` is the whole of what may be written, `values` how one value is read, `reading` puts a file together and says
what is wrong with it, `checks` compares keys with each other, `effect` knows what this release does not do yet.
"""

from tunsplit.config.addresses import Endpoint, Listener
from tunsplit.config.effect import unsupported
from tunsplit.config.reading import parse
from tunsplit.config.schema import (
    App,
    Config,
    Control,
    Dns,
    Firewall,
    Lan,
    Log,
    Section,
    Split,
    Tun,
    Tunnel,
    Uplink,
)

__all__ = [
    "App",
    "Config",
    "Control",
    "Dns",
    "Endpoint",
    "Firewall",
    "Lan",
    "Listener",
    "Log",
    "Section",
    "Split",
    "Tun",
    "Tunnel",
    "Uplink",
    "parse",
    "unsupported",
]
