"""What a valid configuration asks for that this release does not do yet."""

import msgspec

from tunsplit.config.schema import SECTIONS, Config

# Keys whose features are there.
WORKING = {
    "tun": {"name", "forwarded", "address", "mtu"},
    "tunnel": {"interface", "fwmark", "endpoint", "dns", "transport_user", "client"},
    "uplink": {"interface"},
    "split": {"enabled", "mode", "unattributed", "ambiguous", "hold", "protocols", "forwarded", "guests"},
    "app": {"path", "name", "cmdline", "user", "cgroup", "inherit", "force"},
    "dns": {"platform", "custom", "system", "intercept", "listen", "take_over", "filter_aaaa", "fallback"},
    "lan": {"allow", "routes", "discovery"},
    "firewall": {"enabled", "on_stop"},
    "control": {"socket", "group"},
    "log": {"level", "format"},
}
# What follows where that is not plain, above all for who would rely on it.
MEANWHILE = {
    "split kernel": "the kernel's own sockets are unattributed",
}


def unsupported(config: Config) -> list[str]:
    """Return a plain sentence for each setting that is accepted but whose feature comes in a later release."""
    sentences = []
    for section in SECTIONS:
        tables = config.apps if section == "app" else (getattr(config, section),)
        for number, table in enumerate(tables, 1):
            where = f"[[app]] #{number}" if section == "app" else f"[{section}]"
            for field in msgspec.structs.fields(table):
                if field.name in WORKING[section] or getattr(table, field.name) == field.default:
                    continue
                meanwhile = MEANWHILE.get(f"{section} {field.name}", MEANWHILE.get(section))
                sentence = f"{where} {field.name} is accepted but has no effect yet"
                sentences.append(f"{sentence}: {meanwhile}" if meanwhile else sentence)
    return sentences
