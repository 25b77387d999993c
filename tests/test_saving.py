"""The list in the configuration's text: only what is meant changes, and what comes out is what was asked for."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.config import App, parse
from tunsplit.config.saving import checked_path, with_app, without_app, without_apps
from tunsplit.errors import ConfigError

TUNNEL = '[tunnel]\ninterface = "wg0"\nfwmark = 1\n'
SAMPLE = (Path(__file__).parent.parent / "config" / "wireguard.toml").read_text()


def paths(text: str) -> list[str | None]:
    return [app.path for app in parse(text).apps]


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (TUNNEL, TUNNEL + '\n[[app]]\npath = "/new"\n'),
        (TUNNEL.rstrip(), TUNNEL + '\n[[app]]\npath = "/new"\n'),
        (TUNNEL + "\n", TUNNEL + '\n[[app]]\npath = "/new"\n'),
        (
            TUNNEL + "[[app]] # one\npath = '/a'  # first\n\n# about dns\n[dns]\n",
            TUNNEL + "[[app]] # one\npath = '/a'  # first\n\n[[app]]\npath = \"/new\"\n\n# about dns\n[dns]\n",
        ),
        (TUNNEL + "[[app]]\npath = '/a'", TUNNEL + "[[app]]\npath = '/a'\n\n[[app]]\npath = \"/new\"\n"),
        (
            "[[app]]\npath = '/a'\n[tunnel]\ninterface = 'w'\nfwmark = 1\n[[ 'app' ]]\nname = 'b'\n# end\n[lan]\n",
            "[[app]]\npath = '/a'\n[tunnel]\ninterface = 'w'\nfwmark = 1\n[[ 'app' ]]\nname = 'b'\n"
            '\n[[app]]\npath = "/new"\n# end\n[lan]\n',
        ),
        (
            '[tunnel]\r\ninterface = "w"\r\nfwmark = 1\r\n',
            '[tunnel]\r\ninterface = "w"\r\nfwmark = 1\r\n\r\n[[app]]\r\npath = "/new"\r\n',
        ),
        (
            '[tunnel]\r\ninterface = "w"\r\nfwmark = 1',
            '[tunnel]\r\ninterface = "w"\r\nfwmark = 1\r\n\r\n[[app]]\r\npath = "/new"\r\n',
        ),
    ],
)
def test_an_app_is_added_behind_the_last_one_or_at_the_end(before, after):
    assert after == with_app(before, "/new", "t.toml")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (TUNNEL + '\n[[app]]\npath = "/a"\n', TUNNEL),
        (TUNNEL + '[[app]]\npath = "/a"', TUNNEL.rstrip()),
        (
            TUNNEL + '\n# mine\n[[app]] # head\n# inside\npath = "/a" # tail\n# behind\n\n[[app]]\npath = "/b"\n',
            TUNNEL + '\n# mine\n# inside\n# behind\n\n[[app]]\npath = "/b"\n',
        ),
        (TUNNEL + '\n[[app]]\npath = "/a"\n\n[dns]\n', TUNNEL + "\n[dns]\n"),
        (TUNNEL + '[[app]]\ninherit = false\npath = "/a"\nname = "a"\n[dns]\n', TUNNEL + "[dns]\n"),
        (
            TUNNEL + '[[app]]\npath = "/a"\n[[app]]\npath = "/b"\n[[app]]\npath = "/a"\n',
            TUNNEL + '[[app]]\npath = "/b"\n',
        ),
        ('app = [{path = "/b"}]\n' + TUNNEL, 'app = [{path = "/b"}]\n' + TUNNEL),
    ],
)
def test_an_app_is_removed_and_every_comment_stays(before, after):
    assert after == without_app(before, "/a", "t.toml")


def test_clearing_leaves_what_says_more_than_a_path():
    text = (
        TUNNEL
        + '[[app]]\npath = "/a"\n[[app]]\npath = "/b"\ninherit = false\n[[app]]\nname = "c"\n[[app]]\npath = "/d"\n'
    )

    assert TUNNEL + '[[app]]\npath = "/b"\ninherit = false\n[[app]]\nname = "c"\n' == without_apps(text, "t.toml")


def test_what_is_so_already_is_left_as_it_is():
    text = TUNNEL + '[[app]]\npath="/a"'

    assert text == with_app(text, "/a", "t.toml") == without_app(text, "/b", "t.toml")
    assert TUNNEL == without_apps(TUNNEL, "t.toml")


def test_an_entry_that_says_more_is_another_one():
    text = TUNNEL + '[[app]]\npath = "/a"\nuser = "ada"\n'

    assert ["/a", "/a"] == paths(with_app(text, "/a", "t.toml"))


def test_of_the_sample_nothing_but_the_entry_changes():
    added = with_app(SAMPLE, "/usr/bin/curl", "t.toml")

    assert SAMPLE == added.replace('\n[[app]]\npath = "/usr/bin/curl"\n', "", 1)
    assert SAMPLE == without_app(added, "/usr/bin/curl", "t.toml")


@pytest.mark.parametrize(
    ("text", "change"),
    [
        ("app = []\n" + TUNNEL, with_app),
        ('app = [{path = "/a"}]\n' + TUNNEL, without_app),
        (TUNNEL + '[[app]]\npath = """\\\n  /a"""\ncmdline = \'\'\'\n[[app]]\npath = "/a"\'\'\'\n', without_app),
    ],
)
def test_what_lines_cannot_do_is_left_to_the_user(text, change):
    with pytest.raises(ConfigError, match=r"^t\.toml: found .* edit the list there by hand|expected a regular"):
        change(text, "/a", "t.toml")


@pytest.mark.parametrize("change", [with_app, without_app])
def test_a_configuration_that_is_wrong_already_is_not_touched(change):
    with pytest.raises(ConfigError, match="interface"):
        change("[tunnel]\n", "/a", "t.toml")


@pytest.mark.parametrize("path", ["", "relative", "/a/../b", "/new\nline", "/a\x00"])
def test_a_path_that_no_entry_can_have_is_refused(path):
    with pytest.raises(ConfigError, match="path: found"):
        checked_path(path)
    with pytest.raises(ConfigError, match="path: found"):
        with_app(TUNNEL, path, "t.toml")


entries = st.lists(
    st.builds(
        lambda path, more, before, behind: f"{before}[[app]]{behind}\npath = '/{path}'\n{more}",
        st.sampled_from("abc"),
        st.sampled_from(["", "inherit = false\n", "\n# note\n", "\n[dns]\n"]),
        st.sampled_from(["", "\n", "# about\n"]),
        st.sampled_from(["", " # x"]),
    ),
    max_size=5,
).filter(lambda texts: sum("[dns]" in text for text in texts) < 2)


@given(entries=entries, path=st.text(st.characters(exclude_characters="/"), min_size=1).map("/".__add__))
def test_whatever_is_added_can_be_read_and_removed_again(entries, path):
    text = TUNNEL + "".join(entries)
    try:
        checked_path(path)
    except ConfigError:
        return
    before = parse(text)
    added = with_app(text, path, "t.toml")

    assert [*before.apps, App(path=path)] == list(parse(added).apps) or App(path=path) in before.apps
    removed = parse(without_app(added, path, "t.toml"))
    assert msgspec.structs.replace(before, apps=tuple(app for app in before.apps if app.path != path)) == removed
    for comment in ("# note", "# about"):
        assert text.count(comment) == without_apps(added, "t.toml").count(comment)
