"""What this process may do: the capabilities that tunsplit needs, and which of them are there.

Some facts about capabilities(7):

- What counts is the effective set, the line CapEff of /proc/self/status: being uid 0 is neither needed nor enough (a
  container's root lacks most of them).
- Looking into another user's process is ptrace_may_access() (kernel/ptrace.c), so it takes CAP_SYS_PTRACE, whatever
  the modes of the files under /proc/PID say.
- The sets are a thread's; a new thread has its maker's. With PR_SET_NO_NEW_PRIVS a program that uid 0 executes gets no
  more than its caller had (security/commoncap.c, cap_bprm_creds_from_file).
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tunsplit.errors import KernelError

# include/uapi/linux/capability.h, prctl.h
CAPABILITY_VERSION_3 = 0x20080522
PR_SET_NO_NEW_PRIVS = 38


@dataclass(frozen=True, slots=True)
class Capability:
    """One capability: its name, its bit in the kernel's masks, and what tunsplit does with it."""

    name: str
    bit: int
    why: str
    required: bool = True


NEEDED = (
    Capability("CAP_NET_ADMIN", 12, "creates the tun, sets routes, rules and the firewall"),
    Capability("CAP_NET_RAW", 13, "opens packet sockets on the uplink and on the tunnel"),
    Capability("CAP_SYS_PTRACE", 19, "sees which process of another user holds a socket, and its executable"),
    Capability("CAP_DAC_READ_SEARCH", 2, "reaches executables in directories that are closed to others"),
    Capability("CAP_SYS_ADMIN", 21, "enters the initial network namespace, to hear of new processes", required=False),
    Capability("CAP_NET_BIND_SERVICE", 10, "answers on port 53, where dns.listen says so", required=False),
)


def named(name: str) -> Capability:
    """The needed capability of this name."""
    (found,) = (capability for capability in NEEDED if capability.name == name)
    return found


def effective(status: str | None = None) -> frozenset[Capability]:
    """Return which of the needed capabilities this process has.

    Args:
        status: the text of a /proc/PID/status; this process's own if not given.
    """
    mask = _mask("CapEff", Path("/proc/self/status").read_text() if status is None else status)
    return frozenset(capability for capability in NEEDED if mask >> capability.bit & 1)


def _mask(name: str, status: str) -> int:
    (mask,) = (int(line.split()[1], 16) for line in status.splitlines() if line.startswith(f"{name}:"))
    return mask


def keep_only(capabilities: Iterable[Capability]) -> None:
    """Give up all other capabilities for good, and so for every program that is started from now on.

    It is this thread that does, and those that it makes: call it before there are others.

    Raises:
        KernelError: the kernel refuses.
    """
    status = Path("/proc/thread-self/status").read_text()
    kept = sum(1 << capability.bit for capability in capabilities)
    permitted, inheritable = (_mask(name, status) & kept for name in ("CapPrm", "CapInh"))
    # Each set is two words: all low ones first.
    sets = [(one >> shift) & 0xFFFFFFFF for shift in (0, 32) for one in (permitted, permitted, inheritable)]
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", CAPABILITY_VERSION_3, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.capset(header, struct.pack("=6I", *sets)):
        raise KernelError(f"capabilities cannot be given up: {os.strerror(ctypes.get_errno())}")


def missing() -> list[Capability]:
    """Return the required capabilities that this process lacks."""
    there = effective()
    return [capability for capability in NEEDED if capability.required and capability not in there]


def complaint(capabilities: Iterable[Capability]) -> str:
    """Say in one line which capabilities are missing, what each is for, and what to do about it."""
    capabilities = tuple(capabilities)
    names = ", ".join(f"{capability.name} ({capability.why})" for capability in capabilities)
    return f"missing {names}: {how_to_grant(capabilities)}"


def how_to_grant(capabilities: Iterable[Capability]) -> str:
    """Say in one line what to do about missing capabilities."""
    names = [capability.name for capability in capabilities]
    return f"run as root, or let systemd grant it: AmbientCapabilities={' '.join(names)}"
