"""Apps that talk all the time: what they say is numbered and comes back, so what is lost on the way can be told."""

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from tests.netns.stage import App, Stage, until
from tunsplit.lab.observer import Observer

WORDS = ("tcp4", "tcp6", "udp4", "udp6")  # a socket each

# In the app: two threads a socket, of which one only listens, until a connection gives an error. A datagram that is
# refused ends nothing, as in any app that minds its network.
CODE = """
import re
import threading
sockets, sent, heard, told, hushed = {}, {}, {}, {}, False

def talk(word, own):
    own.settimeout(None)
    sockets[word], sent[word], heard[word] = own, 0, set()
    told.pop(word, None)
    for act in (say, listen):
        threading.Thread(target=act, args=(word, own), daemon=True).start()

def say(word, own):
    while sockets[word] is own and ('udp' in word or word not in told):
        while hushed:
            time.sleep(0.01)
        try:
            own.send(f'{me} {word} {sent[word] + 1:06}.'.encode())
            sent[word] += 1
        except OSError as error:
            told.setdefault(word, error.errno)
        time.sleep(0.01)

def listen(word, own):
    rest = b''
    while sockets[word] is own:
        try:
            data = own.recv(65536)
        except OSError as error:
            told[word] = error.errno
            if 'udp' in word:
                continue
            return
        if not data:
            told[word] = 0
            return
        rest += data
        heard[word].update(map(int, re.findall(rb' (\\d{6})\\.', rest)))
        rest = rest[-20:]
"""


class Talker:
    """An app that talks on a socket for each of its words; `name` is in all that it says."""

    def __init__(self, app: App, name: str) -> None:
        self._app = app
        self.name = name

    async def begin(self, words: Iterable[str] = WORDS) -> None:
        """Have it talk, on new sockets."""
        await self._app(CODE, me=self.name)
        for word in words:
            await self._app(f"talk('{word}', {word[:-1]}(SERVER{word[-1]}))")
        await self.is_heard()

    async def is_heard(self, words: Iterable[str] = WORDS) -> bool:
        """Wait until something new that it says on each of these sockets has come back; True."""
        before = await self._app("dict(sent)")

        async def heard() -> bool:
            latest = await self._app("{word: max(numbers, default=0) for word, numbers in heard.items()}")
            return all(latest[word] > before[word] for word in words)

        return bool(await until(heard, f"{self.name} is heard by {list(words)}"))

    async def hush(self, hushed: bool = True) -> None:
        """Have it say no more until all has come back, or go on."""
        await self._app(f"hushed = {hushed}")

        async def all_heard() -> bool:
            return bool(await self._app("all(max(heard[word]) >= sent[word] for word in sent)"))

        if hushed:
            await until(all_heard, f"all of {self.name} has come back")

    async def goes_on(self, count: int = 20) -> bool:
        """Wait until it has said that much more on each socket, heard or not; True."""
        before = await self._app("dict(sent)")

        async def said() -> bool:
            latest = await self._app("dict(sent)")
            return all(latest[word] >= before[word] + count for word in before)

        return bool(await until(said, f"{self.name} goes on"))

    async def lost(self, words: Iterable[str] = WORDS) -> dict[str, int]:
        """How much of what it said before the latest that came back has not, by word, if anything."""
        await self.is_heard(words)
        lost: dict[str, int] = await self._app(
            "{word: len(set(range(1, max(heard[word]))) - heard[word]) for word in words}", words=list(words)
        )
        return {word: count for word, count in lost.items() if count}

    async def until_told(self, words: Iterable[str] = WORDS) -> dict[str, int]:
        """Wait until the listener of each of these sockets was given an error; the latest, by word."""

        async def all_told() -> Any:
            errors = await self._app("dict(told)")
            return errors if set(words) <= set(errors) else None

        errors: dict[str, int] = await until(all_told, f"{self.name} is told on {list(words)}")
        return errors

    async def told(self) -> dict[str, int]:
        """The latest error that each listener was given so far, by word."""
        errors: dict[str, int] = await self._app("dict(told)")
        return errors


@asynccontextmanager
async def open_talk(stage: Stage) -> AsyncIterator[tuple[Talker, Talker]]:
    """Have an excluded and an included app talk."""
    async with AsyncExitStack() as stack:
        talkers = []
        for program in (stage.excluded, stage.included):
            talker = Talker(await stack.enter_async_context(stage.app(program)), program.name)
            await talker.begin()
            talkers.append(talker)
        yield talkers[0], talkers[1]


async def mixed(stage: Stage, *uplinks: Observer) -> list[str]:
    """What was said on the wrong side; more uplinks than the lab's own may be watched."""
    found = []
    for observer, stranger in [
        *((uplink, stage.included.name) for uplink in (stage.lab.uplink, *uplinks)),
        (stage.lab.tunnel, stage.excluded.name),
    ]:
        await observer.settle()
        assert observer.dropped == 0
        found += [f"{observer.name}: {seen}" for seen in observer.seen(payload=stranger.encode())]
    return found
