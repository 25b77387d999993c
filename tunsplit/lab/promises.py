"""The promises that a lab can show, each an app's attempt and a look at both wires.

They build on nobody but their scene, and leave it as they found it.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tunsplit.lab import addresses, demo, dnstrials
from tunsplit.lab.apps import start_app
from tunsplit.lab.scene import SERVERS, BrokenPromise, Scene

SERVER, HOST, ROUTER = (
    {version: str(own[version].ip) for version in own}
    for own in (addresses.SERVER, addresses.HOST, addresses.ROUTER_LAN)
)
HOST_TUNNEL = addresses.HOST_TUNNEL[4].ip
RELAY = str(addresses.RELAY[4].ip)
STRANGER = "198.51.100.77"  # on the internet's network; nobody asks it but a neighbour, by way of the host
CHILDREN = 20

# One datagram in a first moment, by who stays until he has been looked for; and two dozen of them, 20 ms apart.
SEND = (
    "import socket, sys, time\n"
    "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\nown.sendto(b'child', (sys.argv[1], 7)); time.sleep(0.2)"
)
SEND_ON = (
    "import socket, sys, time\n"
    "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
    "for _ in range(24):\n    own.sendto(b'orphan', (sys.argv[1], 7)); time.sleep(0.02)"
)
# In an app: a child of another program, which sends a datagram when it is told.
BEAR = (
    "child = subprocess.Popen([program, '-I', '-S', '-c',"
    " 'import socket, sys\\nfor line in sys.stdin:\\n"
    "    own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.settimeout(3)\\n"
    '    own.sendto(b"child", (sys.argv[1], 7)); print(own.recv(100), flush=True)\', SERVER4],'
    " stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)"
)


@dataclass(frozen=True)
class Promise:
    """What is promised, and how it is shown."""

    name: str
    says: str
    show: Callable[[Scene], Awaitable[None]]


async def sides(scene: Scene) -> None:
    await scene.talks(scene.excluded, "uplink")
    await scene.talks(scene.included, "tunnel")


async def switch(scene: Scene) -> None:
    program = str(scene.programs["included"])
    try:
        for verb, side in (("add", "uplink"), ("remove", "tunnel")):
            await scene.included("own = tcp(SERVER4); read_line(own); own.sendall(b'1'); read_exactly(own, 1)")
            await scene.daemon.command("app", verb, program)
            scene.clear()
            try:
                await scene.included("own.sendall(b'2'); read_exactly(own, 1)")
            except TimeoutError:
                raise BrokenPromise("the old connection is not ended, but hangs") from None
            except OSError:
                await scene.only(side, needed=False)
            else:
                raise BrokenPromise("the old connection goes on")
            await scene.talks(scene.included, side, ("tcp", "udp"))
    finally:
        await scene.daemon.command("app", "remove", program)


async def children(scene: Scene) -> None:
    """The child is a program that would be included by itself."""
    scene.clear()
    await scene.excluded(
        f"for own in [subprocess.Popen([program, '-I', '-S', '-c', code, SERVER4]) for _ in range({CHILDREN})]:\n"
        "    own.wait()",
        program=str(scene.programs["included"]),
        code=SEND,
    )
    await scene.only("uplink")


async def running_children(scene: Scene) -> None:
    await scene.included(BEAR, program=str(scene.programs["included"]))
    try:
        for verb, side in (("add", "uplink"), ("remove", "tunnel")):
            await scene.daemon.command("pid", verb, str(scene.included.pid))
            scene.clear()
            await scene.included("print('go', file=child.stdin, flush=True); told = child.stdout.readline()")
            if not await scene.included("'child' in told"):
                raise BrokenPromise("the child's datagram was not answered")
            await scene.only(side)
    finally:
        await scene.daemon.command("pid", "clear")
        await scene.included("child.communicate(); None")


async def orphans(scene: Scene) -> None:
    scene.clear()
    words = ["sh", "-c", '"$@" >/dev/null & exit 0', "sh", str(scene.programs["included"]), "-I", "-S", "-c", SEND_ON]
    await scene.excluded("subprocess.run([*words, SERVER4], check=True); time.sleep(0.6)", words=words)
    await scene.only("uplink")


async def launch(scene: Scene) -> None:
    for name, side in (("excluded", "uplink"), ("included", "tunnel")):
        scene.clear()
        for _ in range(8):
            await scene.lab.host.run([scene.programs[name], "-I", "-S", "-c", SEND, SERVER[4]])
        await scene.only(side)


async def loopback(scene: Scene) -> None:
    for address in ("127.0.0.1", "::1", HOST[4], HOST[6]):
        await scene.included(
            "server = socket.create_server((own, 0), family=family(own))\n"
            "with server, socket.create_connection(server.getsockname()[:2]) as client:\n"
            "    accepted, peer = server.accept(); accepted.close()",
            own=address,
        )
        if (peer := await scene.included("peer[0]")) != address:
            raise BrokenPromise(f"{address} was seen as {peer}")


async def binding(scene: Scene) -> None:
    for app, other, side in (
        (scene.included, HOST[4], "tunnel"),
        (scene.excluded, str(HOST_TUNNEL), "uplink"),
    ):
        scene.clear()
        await app("own = tcp(SERVER4, source=other); read_line(own); own.close()", other=other)
        await scene.only(side)
    for app, device in ((scene.included, "eth0"), (scene.excluded, addresses.TUNNEL_DEVICE)):
        scene.clear()
        try:
            await app(
                "own = socket.socket(); own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())\n"
                "own.connect((SERVER4, 7))",
                device=device,
            )
        except TimeoutError:
            raise BrokenPromise(f"bound to {device}, it is not refused, but has to wait") from None
        except OSError:
            await scene.only(None)
        else:
            raise BrokenPromise(f"bound to {device}, it was answered")


async def unconnected(scene: Scene) -> None:
    for app, side in ((scene.excluded, "uplink"), (scene.included, "tunnel")):
        scene.clear()
        await app(
            "own = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM); own.bind(('::', 0)); own.settimeout(3)\n"
            "for target in (SERVER6, '::ffff:' + SERVER4):\n"
            "    own.sendto(b'?', (target, 7)); own.recv(100)\n"
            "own.close()"
        )
        await scene.only(side)


async def fragments(scene: Scene) -> None:
    for app, side in ((scene.excluded, "uplink"), (scene.included, "tunnel")):
        scene.clear()
        for version in (4, 6):
            # Of IPv6 the server's first answer may end at a router, which tells it what the tunnel takes.
            try:
                await app("ask('udp', server, bytes(4000))", server=SERVER[version])
            except TimeoutError:
                await app("ask('udp', server, bytes(4000))", server=SERVER[version])
        await scene.only(side)


async def tunnel_down(scene: Scene) -> None:
    scene.lab.tunnel_down()
    try:
        await scene.is_refused(scene.included)
        await scene.talks(scene.excluded, "uplink")
    finally:
        scene.lab.tunnel_up()
    await scene.talks_again(scene.included, "tunnel")


async def reloads(scene: Scene) -> None:
    for app, side in ((scene.excluded, "uplink"), (scene.included, "tunnel")):
        scene.clear()
        await app("own = tcp(SERVER4); read_line(own)")
        for _ in range(3):
            await scene.daemon.command("reload")
            await app("own.sendall(b'1'); read_exactly(own, 1)")
        await app("own.close()")
        await scene.only(side)


async def names(scene: Scene) -> None:
    """Whatever resolver an app asks, the table says who answers; by default the relay's, in the tunnel."""
    cells = dnstrials.TABLE["linux"]["default"]
    for name, cell in zip(("included", "excluded"), cells, strict=True):
        scene.clear()
        program = scene.programs[name]
        outcome = await demo.ask(scene.lab, program, dnstrials.DnsTrial("default", program.name, cell))
        scene.frames.update({"uplink": outcome.uplink, "tunnel": outcome.tunnel})
        if outcome.uplink:
            scene.leaks.append(f"{outcome.uplink} frames with questions of the {name} app on the uplink")
        if not outcome.ok:
            raise BrokenPromise(f"the {name} app's questions were answered by {', '.join(outcome.answers)}")


async def switched_off(scene: Scene) -> None:
    await scene.daemon.command("off")
    try:
        await scene.talks(scene.excluded, "tunnel", ("tcp", "udp"))
    finally:
        await scene.daemon.command("on")
    await scene.talks(scene.excluded, "uplink", ("tcp", "udp"))


async def hidden_addresses(scene: Scene) -> None:
    """A neighbour asks for the tunnel's address as if it were on the local network."""
    route = f"route {{}} {HOST_TUNNEL}/32 dev lan0 src {ROUTER[4]}"
    scene.lab.router.ip(route.format("add"))
    try:
        async with start_app(scene.lab.router, scene.programs["included"]) as neighbour:
            scene.clear()
            code = "socket.setdefaulttimeout(0.5)\nwith contextlib.suppress(OSError): tcp(own, 22)"
            await neighbour(code, own=str(HOST_TUNNEL))
        await scene.lab.uplink.settle()
        told = [seen for seen in scene.lab.uplink.seen(source=HOST_TUNNEL) if seen.direction == "out"]
        scene.leaks += [f"{seen} on the uplink" for seen in told]
    finally:
        scene.lab.router.ip(route.format("delete"))


async def servers(scene: Scene) -> None:
    listen = "if 'server' in globals(): server.close()\nserver = socket.create_server(('', port)); server.settimeout(3)"
    async with start_app(scene.lab.internet, scene.programs["included"]) as client:
        scene.clear()
        await scene.excluded(listen, port=8080)
        await client("own = tcp(host, 8080); own.sendall(b'?')", host=HOST[4])
        await scene.excluded("accepted, _ = server.accept(); accepted.sendall(accepted.recv(1)); accepted.close()")
        await client("read_exactly(own, 1); own.close()")
        await scene.excluded("server.close()")
        await scene.only("uplink")

        await scene.included(listen, port=8081)
        scene.clear()
        try:
            await client("socket.setdefaulttimeout(0.5); tcp(host, 8081)", host=HOST[4])
        except OSError:
            await scene.included("server.close()")
        else:
            raise BrokenPromise("an included server answers on the uplink")
        await scene.lab.uplink.settle()
        told = [one for one in scene.lab.uplink.seen(port=8081) if one.direction == "out"]
        scene.leaks += [f"{one} on the uplink" for one in told]


async def clear_text(scene: Scene) -> None:
    """To the VPN's server, at its port, but without the mark that the VPN's own packets carry."""
    scene.clear()
    try:
        await scene.included(
            "own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); own.settimeout(0.3)\n"
            f"own.sendto(b'clear text', ('{RELAY}', {addresses.TUNNEL_PORT})); own.recv(100)"
        )
    except OSError:
        await scene.lab.uplink.settle()
    scene.leaks += [f"{seen} on the uplink" for seen in scene.lab.uplink.seen(payload=b"clear text")]


async def hostile_routes(scene: Scene) -> None:
    lines = [
        f"route {{}} 0.0.0.0/1 via {ROUTER[4]} dev eth0",
        f"route {{}} 128.0.0.0/1 via {ROUTER[4]} dev eth0",
        f"route {{}} 2000::/3 via {ROUTER[6]} dev eth0",
        f"route {{}} {SERVER[4]}/32 dev {addresses.TUNNEL_DEVICE}",
        f"route {{}} {SERVER[6]}/128 dev {addresses.TUNNEL_DEVICE}",
    ]
    scene.lab.host.ip("\n".join(line.format("add") for line in lines))
    try:
        await sides(scene)
    finally:
        scene.lab.host.ip("\n".join(line.format("delete") for line in lines))


async def new_interface(scene: Scene) -> None:
    host, router = scene.lab.host, scene.lab.router
    host.ip(f"link add other0 type veth peer name other0 netns {router.name}")
    try:
        router.ip("address add 10.99.0.1/24 dev other0\nlink set other0 up")
        host.ip("address add 10.99.0.2/24 dev other0\nlink set other0 up\nroute add 198.18.0.0/15 dev other0")
        async with scene.lab.observe(router, "other0") as third:
            for app in (scene.included, scene.excluded):
                code = (
                    "for target in ('10.99.0.1', '198.18.0.1'):\n"
                    "    for device in (b'', b'other0'):\n"
                    "        own = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n"
                    "        own.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device)\n"
                    "        with contextlib.suppress(OSError), own: own.sendto(b'third', (target, 9))"
                )
                await app(code)
            await third.settle()
            told = [seen for seen in third.seen(payload=b"third") + third.seen("arp") if seen.direction == "in"]
            scene.leaks += [f"{seen} on an interface that is no side" for seen in told]
    finally:
        host.ip("link delete other0")


async def forwarding(scene: Scene) -> None:
    """A neighbour takes the host for a router."""
    scene.lab.host.sysctl({"net/ipv4/ip_forward": 1})
    scene.lab.router.ip(f"route add {STRANGER} via {HOST[4]}")
    try:
        async with start_app(scene.lab.router, scene.programs["included"]) as neighbour:
            scene.clear()
            code = "socket.setdefaulttimeout(0.3)\nfor kind in ('udp', 'tcp'):\n"
            code += "    with contextlib.suppress(OSError): ask(kind, target, b'forward me')"
            await neighbour(code, target=STRANGER)
        await scene.lab.tunnel.settle()
        scene.leaks += [f"{seen} in the tunnel" for seen in scene.lab.tunnel.seen(address=STRANGER)]
        if not scene.lab.uplink.seen(destination=STRANGER):
            raise BrokenPromise("the neighbour's packets were not seen on the uplink")
    finally:
        scene.lab.router.ip(f"route delete {STRANGER}")
        scene.lab.host.sysctl({"net/ipv4/ip_forward": 0})


async def tampering(scene: Scene) -> None:
    for words, restore in (
        (["nft", "flush", "ruleset"], ""),
        (["ip", "rule", "flush"], "rule add priority 32766 lookup main\nrule add priority 32767 lookup default"),
    ):
        scene.clear()
        await scene.lab.host.run(words)
        try:
            await scene.talks_again(scene.included, "tunnel")
        finally:
            scene.lab.host.ip(restore)


async def killed(scene: Scene) -> None:
    await scene.daemon.kill()
    await scene.is_refused(scene.included)
    await scene.daemon.command("undo")
    scene.clear()
    # The control: nothing else has kept it off the uplink.
    await scene.included("ask('udp', SERVER4)")
    await scene.lab.uplink.settle()
    if not any(scene.lab.uplink.seen(address=server) for server in SERVERS):
        raise BrokenPromise("after undo, an app does not reach the uplink")


PROMISES = (  # the last one ends the daemon
    Promise("L1 L8 L12", "an app lives on one side, by TCP, UDP and ping, IPv4 and IPv6", sides),
    Promise("L2 L3", "an app that is switched loses its connections, and opens new ones on its new side", switch),
    Promise("L4", "a child of an excluded app is excluded from birth, whatever program it is", children),
    Promise("L5", "children that run follow when their parent is excluded", running_children),
    Promise("L6", "orphans of an excluded app stay excluded", orphans),
    Promise("L7", "a program that sends in its first moment is on its side", launch),
    Promise("L9", "loopback and the host's own addresses are not touched", loopback),
    Promise("L10 L36", "binding to an address or a device moves no app", binding),
    Promise("L11", "datagrams of unconnected sockets are split", unconnected),
    Promise("L14", "tunnel down: included apps are refused at once, excluded ones go on", tunnel_down),
    Promise("L16", "a reload ends nothing and leaks nothing", reloads),
    Promise("L17 L32", "names are asked by the table, wherever an app asks", names),
    Promise("L18", "switched off, every app is in the tunnel; switched on, the list holds again", switched_off),
    Promise("L19", "the tunnel's address does not show on the local network", hidden_addresses),
    Promise("L20", "a server answers on its app's side only", servers),
    Promise("L22", "fragments follow their flow, both ways", fragments),
    Promise("L23 L33", "nobody sends clear text by naming the VPN's server", clear_text),
    Promise("L25", "routes of DHCP, router advertisements and the VPN change no app's side", hostile_routes),
    Promise("L26", "an interface that appears is closed", new_interface),
    Promise("L31", "nobody on the local network takes the host as a way into the tunnel", forwarding),
    Promise("L34", "what somebody takes away opens nothing, and is put back", tampering),
    Promise("L15", "killed, it leaves included apps cut off; undo opens the way", killed),
)
