"""The log, on stderr: the standard library's logging, set up once.

Fields go in `extra`: `logger.info("uplink changed", extra={"side": "uplink"})` is written as `… uplink changed
side=uplink`, or as one member of a JSON object.
"""

import logging
import sys
import time
from typing import TextIO

import msgspec

# What a record always has; all else came in `extra`.
STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup(level: str = "info", form: str = "text", stream: TextIO | None = None) -> None:
    """Send the records of all loggers to a stream.

    Args:
        level: the least that is written: debug, info, warning, error.
        form: "text", or "json" for one object per line.
        stream: stderr if not given.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def fields(record: logging.LogRecord) -> dict[str, object]:
    """Return what the caller passed in `extra`."""
    return {name: value for name, value in vars(record).items() if name not in STANDARD}


def timestamp(record: logging.LogRecord) -> str:
    """Return the record's time in UTC, to the millisecond (RFC 3339)."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


class TextFormatter(logging.Formatter):
    """`time level logger: message key=value`, and a traceback below it."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record's text, without a line break at its end."""
        parts = [timestamp(record), f"{record.levelname.lower():7}", f"{record.name}:", one_line(record.getMessage())]
        parts += (f"{name}={quoted(str(value))}" for name, value in fields(record).items())
        text = " ".join(parts)
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object as text, without a line break at its end."""
        entry: dict[str, object] = {
            "time": timestamp(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode({**fields(record), **entry}, enc_hook=str).decode()


def one_line(text: str) -> str:
    """Escape what would break a line or talk to the terminal: names of programs may hold anything."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def quoted(value: str) -> str:
    """Return a value that reads as one word."""
    plain = one_line(value)
    return plain if plain and " " not in plain and '"' not in plain else '"' + plain.replace('"', '\\"') + '"'
