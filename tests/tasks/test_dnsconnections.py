"""Several questions on a connection, answered in whatever order the answers come."""

import socket
import struct
from collections import Counter
from ipaddress import ip_address

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tests.fakes.judges import as_real
from tunsplit.errors import KernelError
from tunsplit.tasks import dnsconnections
from tunsplit.tasks.dnsconnections import IDLE_S, Connection, Connections, open_listener, take_untrusted


def framed(message):
    return len(message).to_bytes(2, "big") + message


class Table:
    """Takes questions; the test answers them."""

    def __init__(self):
        self.asked = []
        self.allowed = True

    def __call__(self, message, reply):
        self.asked.append((message, reply))
        return self.allowed

    def answer(self, number, message):
        self.asked[number][1](message)


@pytest.fixture
async def ends(nursery):
    table = Table()
    near, far = trio.testing.memory_stream_pair()
    ended = trio.Event()

    async def run():
        await Connection(near, table).run()
        await near.aclose()
        ended.set()

    nursery.start_soon(run)
    return far, table, ended


async def test_answers_are_told_apart_by_their_length(ends, autojump_clock):
    far, table, _ = ends
    await far.send_all(framed(b"one") + framed(b"two") + framed(b"thr")[:3])
    await trio.testing.wait_all_tasks_blocked()
    assert [b"one", b"two"] == [message for message, _ in table.asked]

    table.answer(1, b"second")
    table.answer(0, b"first")
    await far.send_all(framed(b"thr")[3:])
    await trio.testing.wait_all_tasks_blocked()
    table.answer(2, b"x" * 65535)

    expected = framed(b"second") + framed(b"first") + framed(b"x" * 65535)
    received = b""
    while len(received) < len(expected):
        received += await far.receive_some()
    assert expected == received


async def test_who_is_silent_for_too_long_is_left(ends, autojump_clock):
    far, _, ended = ends
    start = trio.current_time()
    await ended.wait()

    assert IDLE_S == trio.current_time() - start
    assert b"" == await far.receive_some()


async def test_who_has_only_closed_his_half_still_hears(ends, autojump_clock):
    far, table, ended = ends
    await far.send_all(framed(b"one"))
    await far.send_eof()
    await trio.testing.wait_all_tasks_blocked()
    table.answer(0, b"first")

    assert framed(b"first") == await far.receive_some()
    await ended.wait()


async def test_more_questions_wait_in_the_socket(ends, autojump_clock, monkeypatch):
    monkeypatch.setattr(dnsconnections, "MOST_PENDING", 2)
    far, table, _ = ends
    await far.send_all(framed(b"q") * 5)
    await trio.testing.wait_all_tasks_blocked()
    assert 2 == len(table.asked)

    table.answer(0, b"a")
    await trio.testing.wait_all_tasks_blocked()
    assert 3 == len(table.asked)


async def test_who_has_lost_the_right_to_ask_is_left(ends, autojump_clock):
    far, table, ended = ends
    table.allowed = False
    await far.send_all(framed(b"one"))
    start = trio.current_time()
    await ended.wait()

    assert start == trio.current_time()
    table.answer(0, b"late")  # to nobody


async def test_who_does_not_read_is_left(nursery, autojump_clock):
    table = Table()
    near, far = trio.testing.lockstep_stream_pair()
    counters: Counter[str] = Counter()
    connections = Connections(lambda _: (1000, table), counters)
    nursery.start_soon(connections.converse, as_real(near))
    await far.send_all(framed(b"one"))
    await trio.testing.wait_all_tasks_blocked()
    table.answer(0, b"answer")
    await trio.sleep(IDLE_S + 1)

    assert 1 == counters["dns_connections_broken"]


@pytest.mark.parametrize("half", ["open", "closed"])
async def test_who_asks_only_what_gets_no_answer_is_left(ends, autojump_clock, monkeypatch, half):
    """An answer in place of a question, say: a connection that waits for ever would keep its user's place."""
    monkeypatch.setattr(dnsconnections, "MOST_PENDING", 2)
    far, _, ended = ends
    await far.send_all(framed(b"answer") * 2)
    if half == "closed":
        await far.aclose()

    with trio.fail_after(3 * IDLE_S):
        await ended.wait()


@pytest.mark.parametrize("error", [OSError("reset before it was accepted"), KernelError("sock_diag failed")])
async def test_a_connection_that_cannot_be_identified_costs_only_itself(error):
    def fail(_):
        raise error

    counters: Counter[str] = Counter()
    near, far = trio.testing.memory_stream_pair()
    await Connections(fail, counters).converse(as_real(near))

    assert 1 == counters["dns_connections_broken"]
    assert b"" == await far.receive_some()


async def test_a_connection_that_was_reset_before_it_was_accepted_leaves_the_listener(nursery):
    """accept(2) gives it all the same, and getpeername(2) fails: any local program can bring that about."""
    counters: Counter[str] = Counter()
    heard = trio.Event()

    def take(message, reply):
        heard.set()
        return False

    connections = Connections(lambda stream: (stream.socket.getpeername() and 1000, take), counters)
    listener = open_listener(ip_address("127.0.0.1"), 0)
    with socket.create_connection(listener.socket.getsockname()) as early:
        early.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    nursery.start_soon(trio.serve_listeners, connections.converse, [listener])
    async with await trio.open_tcp_stream(*listener.socket.getsockname()) as late:
        await late.send_all(framed(b"one"))
        with trio.fail_after(20):
            await heard.wait()

    assert 1 == counters["dns_connections_broken"]


async def test_nobodys_connection_and_one_too_many_are_closed(nursery, autojump_clock, monkeypatch):
    monkeypatch.setattr(dnsconnections, "MOST_OF_A_USER", 1)
    counters: Counter[str] = Counter()
    users = iter([None, (1000, Table()), (1000, Table()), (1001, Table())])
    connections = Connections(lambda _: next(users), counters)
    fars = []
    for _ in range(4):
        near, far = trio.testing.memory_stream_pair()
        nursery.start_soon(connections.converse, as_real(near))
        await trio.testing.wait_all_tasks_blocked()
        fars.append(far)

    assert {"dns_connections_of_nobody": 1, "dns_connections": 2, "dns_connections_full": 1} == counters
    assert [b"", b""] == [await fars[number].receive_some() for number in (0, 2)]


async def test_a_mistake_costs_one_connection(nursery):
    counters: Counter[str] = Counter()

    def fail(message, reply):
        raise ValueError("a mistake of ours")

    near, far = trio.testing.memory_stream_pair()
    await far.send_all(framed(b"one"))
    await Connections(lambda _: (None, fail), counters).converse(as_real(near))

    assert 1 == counters["failed_ValueError"]


@given(st.binary(max_size=300), st.integers(0, 300))
def test_messages_come_out_however_they_were_cut(data, at):
    whole, pieces = bytearray(data), bytearray()
    taken = []
    for piece in (data[:at], data[at:]):
        pieces += piece
        while (message := take_untrusted(pieces)) is not None:
            taken.append(message)
    expected = []
    while (message := take_untrusted(whole)) is not None:
        expected.append(message)

    assert (expected, whole) == (taken, pieces)
    assert data == b"".join(map(framed, taken)) + bytes(pieces)


async def test_a_listener_may_be_there_before_its_address():
    async with open_listener(ip_address("203.0.113.9"), 0) as listener:
        assert "203.0.113.9" == listener.socket.getsockname()[0]


def test_a_port_that_is_taken_is_said():
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        own.listen()
        with pytest.raises(KernelError, match=r"cannot listen on 127\.0\.0\.1 port"):
            open_listener(ip_address("127.0.0.1"), own.getsockname()[1])
