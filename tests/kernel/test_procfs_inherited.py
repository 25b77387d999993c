"""Which sockets a process may have from before an exec, told by /proc."""

import os
import socket

import pytest

from tests.apps import inode
from tunsplit.kernel import descriptors


def test_only_a_descriptor_that_exec_leaves_may_be_inherited(processes):
    with socket.socket() as own, socket.socket() as other:
        number = inode(own)
        assert not processes.keeps(os.getpid(), {number})
        other.set_inheritable(True)
        assert not processes.keeps(os.getpid(), {number})
        own.set_inheritable(True)
        assert processes.keeps(os.getpid(), {number})
        number = inode(other)
    assert processes.keeps(os.getpid(), {number})  # closed by now
    assert processes.keeps(2**22 + 1, {number})  # who is gone cannot be asked


@pytest.mark.parametrize("text", [b"", b"flags:", b"flags:\tall\n", None])
def test_flags_that_cannot_be_read_hide_nothing(tmp_path, text):
    if text is not None:
        (tmp_path / "3").write_bytes(text)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert not descriptors.closes_on_exec(directory, "3")
    finally:
        os.close(directory)
