"""Two apps, one excluded and one included, that never stop trying all that an app can, and an eye on both wires.

TCP, UDP and ping, new flows and old ones, bound to either side's address or device or naming it, IPv4 and IPv6. Each
app has a server's address of its own, so that every frame tells whose it is: on the other side it is a leak, unless the
way is known to be open.
"""

from collections import Counter
from collections.abc import AsyncGenerator, Iterable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path

from tunsplit.lab import Lab, addresses, servers
from tunsplit.lab.programs import Program, background

SIDE = {"excluded": "uplink", "included": "tunnel"}
TARGETS = {
    app: {version: server.network[number] for version, server in addresses.SERVER.items()}
    for app, number in (("excluded", 80), ("included", 81))
}
SOURCES = {"eth0": addresses.HOST, addresses.TUNNEL_DEVICE: addresses.HOST_TUNNEL}
USABLE = {4: "", 6: " nodad"}  # at once

# Of each way a thread. An error ends an attempt, and the next one comes after a rest.
PERSIST = """
import contextlib, socket, struct, sys, threading, time
rest_s, target, sources = float(sys.argv[1]), sys.argv[2], sys.argv[3:]
family = socket.AF_INET6 if ":" in target else socket.AF_INET
level, unicast, protocol, echo = (41, 76, 58, 128) if ":" in target else (0, 50, 1, 8)
request = struct.pack("!BBHHH", echo, 0, 0, 0, 1) + b"still here"
socket.setdefaulttimeout(0.3)

def new(kind, protocol=0, source="", device="", named=""):
    own = socket.socket(family, kind, protocol)
    if device:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
    if named:
        own.setsockopt(level, unicast, struct.pack("!i", socket.if_nametoindex(named)))
    if source:
        own.bind((source, 0))
    return own

def connect(**how):
    with new(socket.SOCK_STREAM, **how) as own:
        own.connect((target, 7))
        own.recv(100)

def stream():
    with new(socket.SOCK_STREAM) as own:
        own.connect((target, 7))
        while True:
            own.sendall(b"still here")
            own.recv(1000)
            time.sleep(0.05)

def send(**how):
    with new(socket.SOCK_DGRAM, **how) as own:
        own.sendto(b"once", (target, 7))
        own.recv(100)

def ping():
    with new(socket.SOCK_DGRAM, protocol) as own:
        own.sendto(request, (target, 0))
        own.recv(100)

kept = new(socket.SOCK_DGRAM)
kept.connect((target, 7))
held = new(socket.SOCK_DGRAM)

def repeat(attempt, how):
    while True:
        with contextlib.suppress(OSError):
            attempt(**how)
        time.sleep(rest_s)

ways = [(connect, {}), (stream, {}), (send, {}), (ping, {}), (lambda: kept.send(b"kept"), {}),
        (lambda: held.sendto(b"held", (target, 7)), {})]
for one in sources:
    source, device = one.split("%")
    for how in ({"source": source}, {"device": device}, {"named": device}):
        ways += [(send, how)] + ([] if "named" in how else [(connect, how)])
for attempt, how in ways:
    threading.Thread(target=repeat, args=(attempt, how), daemon=True).start()
print("persists", flush=True)
threading.Event().wait()
"""


class Watch:
    """Looks at what the two apps send.

    Attributes:
        closed: whether nothing may be on the wrong side.
        watched: the apps' frames on their own side, by app.
        open: frames on the other side while the way was open, by app.
        leaks: frames on the other side while it was closed.
    """

    def __init__(self, lab: Lab) -> None:
        self.closed = False
        self.watched: Counter[str] = Counter()
        self.open: Counter[str] = Counter()
        self.leaks: list[str] = []
        self._lab = lab

    async def look(self) -> None:
        """Count what has passed since the last look."""
        for observer in (self._lab.uplink, self._lab.tunnel):
            await observer.settle()
            if observer.dropped:
                raise RuntimeError(f"the observer of the {observer.name} did not see all")
            for app, targets in TARGETS.items():
                for target in targets.values():
                    for seen in observer.seen(destination=target):
                        if seen.direction == "in":
                            continue
                        if observer.name == SIDE[app]:
                            self.watched[app] += 1
                        elif self.closed:
                            self.leaks.append(f"{app}, {observer.name}: {seen}")
                        else:
                            self.open[app] += 1
            observer.clear()

    async def close(self) -> None:
        """From now on nothing may be on the wrong side."""
        if not self.closed:
            await self.look()
            self.closed = True

    async def reopen(self) -> None:
        """From now on the way may be open."""
        await self.look()
        self.closed = False

    def words(self) -> list[str]:
        """What was seen, in lines to print."""
        counts = [
            f"{app}: {self.watched[app]:,} packets on the {side}, {self.open[app]:,} beside it while the way was open"
            for app, side in SIDE.items()
        ]
        return [*counts, f"leaks: {len(self.leaks)}", *(f"  {leak}" for leak in self.leaks[:20])]


@asynccontextmanager
async def open_watch(lab: Lab, rest_s: float = 0.1) -> AsyncGenerator[Watch]:
    """Start both apps in a lab; the excluded one is `excluded_program`. They rest for so long between two tries."""
    everybody = [address for targets in TARGETS.values() for address in targets.values()]
    lab.internet.ip("".join(f"address add {one} dev eth0{USABLE[one.version]}\n" for one in everybody))
    async with background() as nursery, AsyncExitStack() as stack:
        servers.serve(lab.internet, everybody, nursery)
        for app, targets in TARGETS.items():
            program = lab.copy_program("python", app)
            for version, target in targets.items():
                running = await stack.enter_async_context(_persist(lab, program, version, str(rest_s), str(target)))
                await running.wait_written("persists")
        yield Watch(lab)


def excluded_program(lab: Lab) -> Path:
    """Where the excluded app's program is."""
    return lab.directory / "bin" / "excluded"


def _persist(lab: Lab, program: Path, version: int, *words: str) -> AbstractAsyncContextManager[Program]:
    sources: Iterable[str] = (f"{own[version].ip}%{device}" for device, own in SOURCES.items())
    return lab.host.start([program, "-I", "-S", "-c", PERSIST, *words, *sources])
