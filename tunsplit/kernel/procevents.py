"""Births, programs and deaths of processes, as they happen: the process events connector.

Some facts about process events (drivers/connector/cn_proc.c, connector.c), each a test in tests/facts/:

- They exist in the initial network namespace only; elsewhere sending is ECONNREFUSED. A socket belongs to the
  namespace that it was made in, so a thread goes there, makes it and ends. /proc/1/ns/net may be closed even to
  root; kthreadd lives in the same namespace. Pids are those of the initial pid namespace, and who subscribes from
  another pid or user namespace gets neither events nor an answer.
- Order makes the launch race decidable. A fork event is queued before the child runs (kernel/fork.c, copy_process),
  an exec event before the new program's first instruction (fs/exec.c, exec_binprm). So when a packet of a process is in
  hand, all that made the process what it is lies in this queue: drain it, then judge.
- An exit event is queued when the children have another parent already, and whoever waits for the process may know of
  its end (kernel/exit.c, do_exit: exit_notify comes first). Mostly that is microseconds before, and milliseconds where
  the processor is taken from it in between.
- /proc/PID/exe shows a new program a little before its exec event is queued.
- Every thread has events. A thread's own pid differs from its tgid. A leader that exits may leave threads behind, and
  when another thread calls exec, the leader's exit comes before the exec, or soon after it: then under the number that
  the other had until then (fs/exec.c, de_thread).
- With CLONE_PARENT the event names the caller's parent, and so does /proc; nothing names the caller.
- An overrun is told before what is still queued, and until the queue has been emptied the kernel adds nothing to it.
  So after `Overrun`: read until nothing comes, then look at all processes anew.
- Since Linux 6.6 a subscription may name the kinds of events. Older kernels ignore such a message without a word,
  therefore it follows one that asks for all. The answer to it never comes: it is of no kind that it names. So there
  may be many datagrams between two events that count, and a queue without such events need not be empty.
- Events are dated by CLOCK_MONOTONIC, which stands still while the host is suspended; /proc dates births by
  CLOCK_BOOTTIME, which does not. Queued before a suspend and read after it, an event says nothing of either.
- A kernel before 6.6 counts subscribers and does not notice their death, hence the farewell.
"""

import ctypes
import errno
import os
import select
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from struct import Struct
from typing import NamedTuple

from tunsplit.errors import KernelError, PermissionMissing
from tunsplit.kernel import caps
from tunsplit.kernel.closing import Closing
from tunsplit.kernel.netlink import NLMSG_DONE, message
from tunsplit.kernel.procpid import parse_stat

NETLINK_CONNECTOR = 11  # linux/netlink.h
CN_IDX_PROC, CN_VAL_PROC = 1, 1  # linux/connector.h
CLONE_NEWNET = 0x40000000  # linux/sched.h
SO_RCVBUFFORCE = 33  # asm-generic/socket.h

# linux/cn_proc.h
PROC_CN_MCAST_LISTEN, PROC_CN_MCAST_IGNORE = 1, 2
NONE, FORK, EXEC, UID, EXIT = 0, 1, 2, 4, 0x80000000

QUEUE = 8 << 20  # bytes: 6,000 events; the default holds 256
BATCH = 256  # events of one `read`, under a millisecond: a fork bomb must not keep us for ever
MOST_READ = 64 * BATCH  # datagrams of one `read`: who renames his threads all the time must not, either
SUSPEND_NS = 1_000_000_000  # a shorter one is nobody's; what the scheduler does between two clocks is shorter
SIZE = 76  # of every event: the union at its end is as long as its longest member

# nlmsghdr: type, then cn_msg: idx · val · ack, then proc_event: what · timestamp · pids, or errno
unpack_event = Struct("=4xH10xII4xI4xI4xQiiii").unpack_from
# cn_msg: idx · val · seq · ack · len · flags
pack_message = Struct("=IIIIHH").pack
pack_u32 = Struct("=I").pack

new = tuple.__new__  # a third of the price of the class's own constructor
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Fork(NamedTuple):
    """A task was born; a thread where `child_pid` differs from `child_tgid`.

    `at`, here and below: in clock ticks since boot, like a start time, and never before the one that it belongs to.
    """

    parent_pid: int
    parent_tgid: int
    child_pid: int
    child_tgid: int
    at: int


class Exec(NamedTuple):
    """A process became another program."""

    pid: int
    tgid: int
    at: int


class Exit(NamedTuple):
    """A task ended."""

    pid: int
    tgid: int
    at: int


class UidChanged(NamedTuple):
    """A task has another user; `uid` is the effective one."""

    pid: int
    tgid: int
    uid: int
    at: int


class Overrun(NamedTuple):
    """Events were lost."""


Event = Fork | Exec | Exit | UidChanged | Overrun


class ProcessEvents(Closing):
    """A subscription to the events of all processes, from now on. For one thread.

    Raises:
        PermissionMissing: CAP_NET_ADMIN, or CAP_SYS_ADMIN to enter the initial network namespace, is missing.
        KernelError: no way to the connector, or it does not speak to us.
    """

    def __init__(self) -> None:
        try:
            self._socket = _subscribe()
        except ConnectionRefusedError:
            self._socket = _in_initial_network(_subscribe)
        self._buffer = bytearray(4096)
        # Cheaper than to try; a queue that has overrun is an error, which poll(2) tells unasked.
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._received = self._overruns = 0
        self._to_boot_ns = _boot_offset_ns()

    def close(self) -> None:
        """End the subscription."""
        try:
            _send(self._socket, PROC_CN_MCAST_IGNORE)
        except OSError:  # its end tells a newer kernel all the same
            pass
        finally:
            self._socket.close()

    def fileno(self) -> int:
        """The descriptor to wait on."""
        return self._socket.fileno()

    def waiting(self) -> bool:
        """Whether there is something to read: cheaper than to try, where that is asked for each batch of packets."""
        return bool(self._poll.poll(0))

    def read(self) -> list[Event]:
        """What has happened, oldest first; at most `BATCH` events: with fewer, the queue was empty at the end.

        Raises:
            KernelError: the socket fails, or what is of no use comes faster than it can be read.
        """
        if not self._poll.poll(0):  # mostly there is nothing, and this is asked before each first packet
            return []
        events: list[Event] = []
        receive, buffer = self._socket.recvfrom_into, self._buffer
        to_boot_ns = None
        for _ in range(MOST_READ):
            try:
                size, sender = receive(buffer)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise KernelError(f"process events: {error.strerror}") from error
                self._overruns += 1
                events.append(Overrun())
                continue
            if to_boot_ns is None:
                to_boot_ns = _boot_offset_ns()
                if to_boot_ns - self._to_boot_ns > SUSPEND_NS:
                    # The host was suspended. What was queued before that would be dated by as much too late.
                    self._overruns += 1
                    events.append(Overrun())
                self._to_boot_ns = to_boot_ns
            if sender[0] == 0 and (event := parse_untrusted(buffer, size, to_boot_ns)) is not None:
                events.append(event)
                if len(events) >= BATCH:
                    break
        else:
            raise KernelError("process events: others come faster than they can be read")
        self._received += len(events)
        return events

    def statistics(self) -> dict[str, int]:
        """Events received, and how often some were lost."""
        return {"process_events": self._received, "process_overruns": self._overruns}


def parse_untrusted(packet: bytes | bytearray, size: int, to_boot_ns: int) -> Event | None:
    """Read one datagram of the connector; None for anything that is no event of a kind that counts.

    Args:
        packet: the datagram, and after `size` whatever the buffer held before.
        size: of the datagram.
        to_boot_ns: what CLOCK_BOOTTIME is ahead of CLOCK_MONOTONIC, the clock of the events.
    """
    if size < SIZE:
        return None
    kind, index, value, _, what, timestamp, first, second, third, fourth = unpack_event(packet)
    if index != CN_IDX_PROC or value != CN_VAL_PROC or kind != NLMSG_DONE:
        return None
    at = (timestamp + to_boot_ns) // TICK_NS
    if what == FORK:
        return new(Fork, (first, second, third, fourth, at))
    if what == EXIT:
        return new(Exit, (first, second, at))
    if what == EXEC:
        return new(Exec, (first, second, at))
    if what == UID:
        return new(UidChanged, (first, second, fourth & 0xFFFFFFFF, at))
    return None


def initial_network() -> int:
    """A descriptor of the initial network namespace, for the caller to close.

    Raises:
        KernelError: it cannot be reached.
    """
    try:
        return os.open("/proc/1/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        complaint = error.strerror
    try:
        with open("/proc/2/stat", "rb") as stat:  # noqa: PTH123 -- bytes of /proc, read once
            # A process of this number that is no kernel thread lives in a pid namespace of its own.
            if parse_stat(stat.read()).is_kernel:
                return os.open("/proc/2/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        complaint = f"{complaint}; /proc/2: {error}"
    raise KernelError(
        "process events exist only in the initial network namespace, and there is no way into it "
        f"(/proc/1/ns/net: {complaint}): start tunsplit where /proc shows the host's processes"
    )


def is_initial_network() -> bool:
    """Whether the calling thread is in the initial network namespace, as far as that can be seen."""
    try:
        descriptor = initial_network()
    except KernelError:
        return False
    try:
        return os.path.samestat(os.fstat(descriptor), Path("/proc/thread-self/ns/net").stat())
    finally:
        os.close(descriptor)


def _in_initial_network(function: Callable[[], socket.socket]) -> socket.socket:
    def enter_and_call() -> socket.socket:
        descriptor = initial_network()
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(descriptor, CLONE_NEWNET):
                number = ctypes.get_errno()
                if number == errno.EPERM:
                    raise PermissionMissing(caps.complaint([caps.named("CAP_SYS_ADMIN")]))
                raise KernelError(f"setns: {os.strerror(number)}")
        finally:
            os.close(descriptor)
        return function()

    # The thread ends in the other namespace; nothing else ever runs in it.
    with ThreadPoolExecutor(1, thread_name_prefix="initial-network") as thread:
        try:
            return thread.submit(enter_and_call).result()
        except ConnectionRefusedError as error:
            raise KernelError(
                "the connector refuses: /proc shows another network namespace as the initial one, "
                "or the kernel lacks CONFIG_PROC_EVENTS"
            ) from error


def _subscribe() -> socket.socket:
    """A subscribed socket of the calling thread's network namespace.

    Raises:
        ConnectionRefusedError: there are no process events in this namespace.
        PermissionMissing: we may not.
        KernelError: it fails otherwise.
    """
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        events = socket.socket(socket.AF_NETLINK, kind, NETLINK_CONNECTOR)
    except OSError as error:
        raise KernelError(f"socket(NETLINK_CONNECTOR): {error.strerror}: CONFIG_CONNECTOR is needed") from error
    try:
        events.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, QUEUE)
        events.bind((0, CN_IDX_PROC))
        port = events.getsockname()[0]
        _send(events, PROC_CN_MCAST_LISTEN, acknowledged=port)
        _check_answer(events, port + 1)
        _send(events, PROC_CN_MCAST_LISTEN, FORK | EXEC | UID | EXIT)
    except BaseException as error:
        events.close()
        if isinstance(error, PermissionError):
            raise PermissionMissing("CAP_NET_ADMIN is needed to receive process events") from error
        if isinstance(error, OSError) and not isinstance(error, ConnectionRefusedError):
            raise KernelError(f"process events: {error.strerror}") from error
        raise
    return events


def _send(events: socket.socket, *operation: int, acknowledged: int = 0) -> None:
    content = b"".join(map(pack_u32, operation))
    body = pack_message(CN_IDX_PROC, CN_VAL_PROC, 0, acknowledged, len(content), 0) + content
    events.send(message(NLMSG_DONE, 0, 0, body))


def _check_answer(events: socket.socket, expected: int) -> None:
    """Look for the kernel's answer, which is queued before send() returns.

    Every subscriber gets it. It counts up the acknowledgement that we sent; its sequence number counts events.
    """
    while True:
        try:
            packet, sender = events.recvfrom(4096)
        except BlockingIOError:
            raise KernelError(
                "the connector does not answer: process events are for the initial pid and user namespaces only"
            ) from None
        if sender[0] or len(packet) < SIZE:
            continue
        _, index, _, acknowledged, what, _, number, *_ = unpack_event(packet)
        if index == CN_IDX_PROC and what == NONE and acknowledged == expected:
            if number:
                raise OSError(number, os.strerror(number))
            return


def _boot_offset_ns() -> int:
    # Read in this order, the difference is never too small.
    monotonic = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - monotonic
