"""What a configuration asks for that this release does not do is said, and nothing else is."""

import msgspec
import pytest

from tests.test_config_values import KEYS, document
from tunsplit.config import parse, unsupported
from tunsplit.config.effect import WORKING
from tunsplit.config.schema import SECTIONS


def test_the_defaults_ask_for_nothing_that_is_missing():
    assert [] == unsupported(parse("[tunnel]\ninterface = 'wg0'\nfwmark = 1"))


def test_every_key_of_a_rule_works():
    keys = "path = '/x'\nname = 'y'\ncmdline = 'z'\nuser = 'root'\ncgroup = '/a'\ninherit = false"
    assert [] == unsupported(parse(f"[tunnel]\ninterface = 'w'\nfwmark = 1\n[[app]]\n{keys}"))


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (good, _) in KEYS.items() for value in good])
def test_each_key_either_works_or_is_named_when_it_is_not_at_its_default(key, value):
    section, name = key.split()
    config = parse(document(key, value))
    table = config.apps[0] if section == "app" else getattr(config, section)
    field = next(field for field in msgspec.structs.fields(table) if field.name == name)
    default = getattr(table, name) == field.default

    named = any(f"] {name} " in line or f"#1 {name} " in line for line in unsupported(config))

    assert named == (name not in WORKING[section] and not default)


def test_what_works_is_spelled_as_in_the_schema():
    assert set(WORKING) == set(SECTIONS)
    assert [] == [name for section, names in WORKING.items() for name in names if not hasattr(SECTIONS[section], name)]
