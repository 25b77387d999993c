"""The configuration that a lab writes is TOML, and says what it was asked to say."""

import tomllib
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from tunsplit.lab.configuration import render

values = st.one_of(
    st.booleans(),
    st.integers(-(2**31), 2**31),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    st.lists(st.sampled_from(["a", "203.0.113.10:51820/udp", 'quo"te']), max_size=3),
)
sections = st.dictionaries(st.sampled_from(["tun", "split", "dns"]), st.dictionaries(st.sampled_from("abc"), values))


@given(sections, sections)
def test_an_override_replaces_its_key_and_no_other(base, overrides):
    wanted = {name: {**base.get(name, {}), **overrides.get(name, {})} for name in {**base, **overrides}}

    assert wanted == tomllib.loads(render(base, overrides, []))


def test_excluded_programs_are_apps_by_path():
    text = render({}, {}, [Path("/usr/bin/curl"), "/opt/games/**"])

    assert {"app": [{"path": "/usr/bin/curl"}, {"path": "/opt/games/**"}]} == tomllib.loads(text)
