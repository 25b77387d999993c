"""The log's two forms."""

import io
import json
import logging
import re
import sys

import pytest

from tunsplit import log


@pytest.fixture
def stream():
    """A stream that the log is written to, with the root logger put back afterwards."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for handler in handlers:
        root.removeHandler(handler)  # or setup() would close pytest's own
    yield io.StringIO()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)


def test_text_has_time_level_logger_message_and_fields(stream):
    log.setup("info", "text", stream)
    logging.getLogger("tunsplit.x").warning("side %s changed", "uplink", extra={"mtu": 1500, "exe": "/a b"})

    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z warning tunsplit\.x: side uplink changed mtu=1500 exe=\"/a b\"\n",
        stream.getvalue(),
    )


def test_what_is_below_the_level_is_left_out(stream):
    log.setup("warning", "text", stream)
    logging.getLogger("tunsplit.x").info("x")

    assert "" == stream.getvalue()


def test_json_is_one_object_a_line(stream):
    log.setup("debug", "json", stream)
    logging.getLogger("tunsplit.x").debug("two\nlines", extra={"address": stream.__class__, "level": "mine"})

    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert ("debug", "tunsplit.x", "two\nlines") == (entry["level"], entry["logger"], entry["message"])
    assert "<class '_io.StringIO'>" == entry["address"]


@pytest.mark.parametrize("form", ["text", "json"])
def test_an_exception_has_its_traceback(stream, form):
    log.setup("info", form, stream)
    try:
        raise ZeroDivisionError("by nothing")
    except ZeroDivisionError:
        logging.getLogger("tunsplit.x").exception("failed")

    assert "Traceback (most recent call last)" in stream.getvalue()
    assert "ZeroDivisionError: by nothing" in stream.getvalue()


def test_no_name_of_a_program_can_forge_a_line(stream):
    log.setup("info", "text", stream)
    logging.getLogger("x").info("started %s", "a\nb\x1b[2J", extra={"exe": 'c\nd "', "empty": ""})

    (line,) = stream.getvalue().splitlines()
    assert line.endswith('started a\\nb\\x1b[2J exe="c\\nd \\"" empty=""')


def test_it_goes_to_stderr(stream, capsys):
    log.setup()
    logging.getLogger("x").info("here")

    assert "here" in capsys.readouterr().err
    assert sys.stdout is not None
