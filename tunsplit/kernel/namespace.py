"""Network namespaces of our own, for a moment: what is tried there changes nothing here.

A namespace is a thread's (unshare(2)), and lives as long as something in it. A thread that has left its process's
namespace must end there, so each has one of its own.
"""

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from tunsplit.errors import KernelError

CLONE_NEWNET = 0x40000000  # linux/sched.h

T = TypeVar("T")


def call_in_new(function: Callable[[], T]) -> T:
    """Call a function in a new network namespace; what it raises comes out.

    Raises:
        KernelError: there may be no new namespace (CAP_SYS_ADMIN).
    """
    answer: Future[T] = Future()

    def enter_and_call() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.unshare(CLONE_NEWNET):
                raise KernelError(f"no network namespace to try it in: {os.strerror(ctypes.get_errno())}")
            answer.set_result(function())
        except BaseException as error:  # it is the caller's
            answer.set_exception(error)

    thread = threading.Thread(target=enter_and_call)
    thread.start()
    thread.join()
    return answer.result()
