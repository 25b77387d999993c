"""The configuration of a tunsplit that runs in the lab."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

Section = Mapping[str, Any]


def render(sections: Mapping[str, Section], overrides: Mapping[str, Section], excluded: Iterable[str | Path]) -> str:
    """TOML of these sections, of what overrides them key by key, and of one `[[app]]` for each path.

    A key whose value is None is left out.
    """
    merged = {name: {**sections.get(name, {}), **overrides.get(name, {})} for name in {**sections, **overrides}}
    parts = [_render_section(f"[{name}]", section) for name, section in merged.items()]
    parts += [_render_section("[[app]]", {"path": str(path)}) for path in excluded]
    return "\n".join(parts)


def _render_section(head: str, section: Section) -> str:
    return "".join(
        f"{line}\n"
        for line in (
            head,
            *(f"{key} = {_render_value(value)}" for key, value in section.items() if value is not None),
        )
    )


def _render_value(value: object) -> str:
    # Strings, numbers, booleans and lists of these are written alike in JSON and in TOML, but for two things: TOML
    # has no surrogate pairs, and wants DEL escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
