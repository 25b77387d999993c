"""Whether a program is root's alone to choose."""

import os

import pytest

from tunsplit.kernel.trust import why_not_roots

pytestmark = pytest.mark.netns  # files of others are root's to make


@pytest.fixture
def program(tmp_path):
    """A program in a directory that is root's, as those above are: /tmp is sticky."""
    made = tmp_path / "bin" / "openvpn"
    made.parent.mkdir()
    made.write_bytes(b"\x7fELF")
    made.chmod(0o755)
    return made


def test_what_root_alone_can_write_is_roots(program):
    assert None is why_not_roots("/bin/sh")
    assert None is why_not_roots(str(program))
    assert None is why_not_roots(str(program.with_name("not-there-yet")))


def test_a_file_that_others_own_or_write_is_not(program):
    program.chmod(0o775)
    assert "is not root's alone: it can be written by others (mode 0775)" == why_not_roots(str(program))
    program.chmod(0o755)
    os.chown(program, 1000, 0)
    assert "is not root's alone: it belongs to uid 1000" == why_not_roots(str(program))


def test_nor_is_one_in_a_directory_of_theirs(program):
    program.parent.chmod(0o757)
    words = f"is not root's alone: {program.parent} can be written by others (mode 0757)"
    assert words == why_not_roots(str(program))
    assert words == why_not_roots(str(program.with_name("not-there-yet")))
    program.parent.chmod(0o1757)  # sticky: what is root's they cannot replace
    assert None is why_not_roots(str(program))


def test_a_symlinks_directories_count_at_both_ends(program, tmp_path):
    link = tmp_path / "theirs" / "openvpn"
    link.parent.mkdir()
    link.symlink_to(program)
    assert None is why_not_roots(str(link))
    os.chown(link.parent, 1000, 0)
    assert f"is not root's alone: {link.parent} belongs to uid 1000" == why_not_roots(str(link))
    os.chown(link.parent, 0, 0)
    os.chown(program, 1000, 0)
    assert f"is not root's alone: {program} belongs to uid 1000" == why_not_roots(str(link))


def test_what_cannot_be_looked_at_says_so(program):
    assert "cannot be looked at (Not a directory)" == why_not_roots(f"{program}/x")
