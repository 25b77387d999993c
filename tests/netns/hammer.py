"""An app that never stops sending: what it says is numbered, so what was sent after a switch can be told."""

import re
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from tests.netns.stage import SERVER, until
from tunsplit.lab.observer import Observer
from tunsplit.lab.record import KEPT

Tell = Callable[[str], Awaitable[Any]]  # an app, or its child

# Each socket has a thread of its own, which ends with the first error that its socket gives.
CODE = """
import threading
said, ended, stopping = [0], {}, False

def hammer(word, own, target=None):
    def run():
        try:
            while not stopping:
                said[0] += 1
                text = f'{word} {said[0]:08}.'.encode()
                own.send(text) if target is None else own.sendto(text, target)
                time.sleep(0.005)
        except OSError as error:
            ended[word] = error.errno
    threading.Thread(target=run, daemon=True).start()
"""
CONNECTED = {f"{protocol}{version}": (protocol, version) for protocol in ("tcp", "udp") for version in (4, 6)}
NUMBER = re.compile(rb" (\d{8})\.")


async def begin(app: Tell, words: Iterable[str] = CONNECTED) -> None:
    """Have an app send on a connected socket for each of these, in IPv4 and IPv6, TCP and UDP."""
    await app(CODE)
    for word in words:
        protocol, version = CONNECTED[word]
        await app(f"{word} = {protocol}(SERVER{version}); hammer('{word}', {word})")


async def is_seen(observer: Observer, words: Iterable[str] = CONNECTED) -> bool:
    """Whether something of each was seen."""
    await observer.settle()
    return all(numbers(observer, word) for word in words)


def numbers(observer: Observer, word: str) -> list[int]:
    """The numbers that were seen on their way out, after this word."""
    frames = observer.seen(payload=word.encode())
    counts = observer.flows()
    assert all(counts[flow] <= KEPT for flow in {frame.flow for frame in frames}), "what came later was not kept"
    return [
        int(number)
        for frame in frames
        if frame.direction == "out"
        for number in NUMBER.findall(frame.payload)
        if word.encode() + b" " + number in frame.payload
    ]


def resets(observer: Observer, version: int) -> int:
    """How many RSTs went out to the server."""
    return sum(frame.is_reset for frame in observer.seen("tcp", destination=SERVER[version]))


async def until_ended(app: Tell, words: Iterable[str] = CONNECTED) -> dict[str, Any]:
    """Wait until every socket has given an error; which one, by word."""

    async def ended() -> Any:
        told = await app("dict(ended)")
        return told if set(words) <= set(told) else None

    told: dict[str, Any] = await until(ended, f"the sockets of {list(words)} ended")
    return told
