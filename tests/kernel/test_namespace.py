"""Network namespaces for a moment."""

import ctypes
import os
from pathlib import Path

import pytest

from tunsplit.errors import KernelError
from tunsplit.kernel.namespace import call_in_new

pytestmark = pytest.mark.netns


def test_a_function_is_called_elsewhere_and_we_stay():
    own = Path("/proc/thread-self/ns/net").readlink()

    assert own != call_in_new(Path("/proc/thread-self/ns/net").readlink)
    assert own == Path("/proc/thread-self/ns/net").readlink()


def test_what_it_raises_comes_out():
    with pytest.raises(ZeroDivisionError):
        call_in_new(lambda: 1 // 0)


def test_a_namespace_that_is_refused_is_said(monkeypatch):
    class Libc:
        def unshare(self, _: int) -> int:
            ctypes.set_errno(1)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Libc())
    with pytest.raises(KernelError, match=os.strerror(1)):
        call_in_new(int)
