"""resolv.conf is read as the C library reads it, and comes back as it was from whatever moment."""

import fcntl
import os
import subprocess
import sys
from functools import partial
from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunsplit.errors import KernelError
from tunsplit.kernel import resolvconf
from tunsplit.kernel.resolvconf import ResolvConf, give_back, is_taken, parse_untrusted, read, taken_over, takeover

OURS = [ip_address("127.0.0.54")]
CONTENT = (
    "# by dhcp\nnameserver 192.168.50.53\nnameserver fe80::1%eth0\nsearch lan example.org\noptions ndots:2 edns0\n"
)
SAID = ResolvConf(
    (ip_address("192.168.50.53"), ip_address("fe80::1%eth0")), ("lan", "example.org"), ("ndots:2", "edns0")
)


@pytest.fixture(params=["file", "symlink", "absent", "dangling"])
def path(request, tmp_path):
    """resolv.conf as hosts have it."""
    path = tmp_path / "resolv.conf"
    if request.param == "file":
        path.write_text(CONTENT)
        path.chmod(0o640)
    elif request.param == "symlink":
        (tmp_path / "run").mkdir()
        (tmp_path / "run/resolv.conf").write_text(CONTENT)
        path.symlink_to("run/resolv.conf")
    elif request.param == "dangling":
        path.symlink_to("run/nowhere")
    return path


def picture(directory):
    """What lies in a directory, down to inodes and modes."""
    return {
        one.name: (one.lstat().st_ino, one.lstat().st_mode, one.readlink() if one.is_symlink() else None)
        for one in directory.iterdir()
    }


def test_what_a_file_says_is_read(tmp_path):
    (tmp_path / "resolv.conf").write_text(CONTENT)
    assert SAID == read(tmp_path / "resolv.conf")
    assert ResolvConf() == read(tmp_path / "nowhere")
    assert ResolvConf() == read(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"nameserver 1.1.1.1 2.2.2.2\nnameserver\t::1\r\n", ResolvConf((ip_address("1.1.1.1"), ip_address("::1")))),
        (b"nameserver 1.1.1.1\nnameserver 1.1.1.1", ResolvConf((ip_address("1.1.1.1"),))),
        (b"#nameserver 1.1.1.1\n;nameserver 1.1.1.1\nNAMESERVER 1.1.1.1\nnameserver\n", ResolvConf()),
        (b"nameserver 1.1.1\nnameserver fe80::1%\nnameserver \xff\n", ResolvConf()),
        (b"search a b\ndomain c d\n", ResolvConf(search=("c",))),
        (b"options a\noptions b c\n", ResolvConf(options=("a", "b", "c"))),
    ],
)
def test_what_is_no_line_is_passed_over(text, said):
    assert said == parse_untrusted(text)


@given(st.binary(max_size=2000) | st.text().map(lambda text: f"nameserver {text}\nsearch {text}".encode()))
def test_whatever_lies_there_is_read_without_an_error(text):
    assert len(parse_untrusted(text).servers) <= resolvconf.MOST_SERVERS


def test_a_huge_file_is_read_in_part():
    text = b"".join(b"nameserver 10.%d.%d.1\noptions x y\n" % divmod(number, 256) for number in range(60_000))
    said = parse_untrusted(text)
    assert (resolvconf.MOST_SERVERS, resolvconf.MOST_WORDS) == (len(said.servers), len(said.options))


def test_it_is_ours_for_a_while_and_then_just_as_before(path):
    before, said = picture(path.parent), read(path)
    with taken_over(OURS, path):
        assert is_taken(path)
        assert said == read(path)  # what it would say without us
        ours = parse_untrusted(path.read_bytes())
        assert ResolvConf(tuple(OURS), said.search, said.options) == ours
        assert 0o644 == path.stat().st_mode & 0o777
    assert before == picture(path.parent)
    assert not give_back(path)
    assert before == picture(path.parent)


def test_to_take_what_is_taken_keeps_the_original(path):
    before = picture(path.parent)
    takeover(OURS, path).close()
    takeover([ip_address("::1")], path).close()
    assert (ip_address("::1"),) == parse_untrusted(path.read_bytes()).servers
    assert give_back(path)
    assert before == picture(path.parent)


def dying(moment, call):
    """Call in a child that dies before its n-th change to the directory; whether it lived."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    left = iter(range(moment))

    def mortal(real, *arguments, **options):
        next(left, None) is not None or os._exit(9)
        return real(*arguments, **options)

    for name in ("open", "link", "unlink", "replace", "fsync"):
        setattr(os, name, partial(mortal, getattr(os, name)))
    call()
    os._exit(0)


@pytest.mark.parametrize("verb", ["takeover", "give_back"])
def test_killed_at_any_moment_it_comes_back_as_it_was(path, verb):
    before, said = picture(path.parent), read(path)
    for moment in range(30):
        if verb == "give_back":
            takeover(OURS, path).close()
        lived = dying(moment, lambda: takeover(OURS, path) if verb == "takeover" else give_back(path))
        assert said == read(path)
        give_back(path)
        assert before == picture(path.parent)
        if lived:
            break
    assert 3 < moment < 29


def test_a_daemon_that_does_not_take_it_gives_back_what_a_killed_one_has_left(path):
    """L15: the next start repairs the host by itself, also with another configuration."""
    before = picture(path.parent)
    takeover(OURS, path).close()
    with taken_over([], path):
        assert before == picture(path.parent)
    assert before == picture(path.parent)


def test_what_somebody_else_has_put_there_since_is_theirs(path):
    held = takeover(OURS, path)
    path.unlink()
    path.write_text("nameserver 9.9.9.9\n")
    assert not is_taken(path)
    assert (ip_address("9.9.9.9"),) == read(path).servers
    give_back(path, held)
    assert "nameserver 9.9.9.9\n" == path.read_text()
    assert not path.with_name("resolv.conf.tunsplit-original").exists()


def test_what_somebody_else_has_put_there_since_is_what_comes_back_of_the_next_takeover(path):
    takeover(OURS, path).close()
    path.unlink()
    path.write_text("nameserver 9.9.9.9\n")
    with taken_over(OURS, path):
        assert (ip_address("9.9.9.9"),) == read(path).servers
    assert "nameserver 9.9.9.9\n" == path.read_text()


def test_what_a_daemon_of_another_namespace_has_taken_is_left_to_it_while_it_runs(path):
    held = takeover(OURS, path)
    with pytest.raises(KernelError, match="is taken by the tunsplit of another network namespace"):
        takeover(OURS, path)
    assert not give_back(path)
    assert is_taken(path)
    held.close()  # as when it is killed
    assert give_back(path)
    assert not is_taken(path)


def test_who_may_only_read_it_cannot_keep_it_from_coming_back(path):
    """Whoever resolves names may open it, and wait with a lock for the daemon's end."""
    said = read(path)
    held = takeover(OURS, path)
    assert "0o644" == oct(path.stat().st_mode & 0o777)
    with path.open("rb") as reader:
        held.close()
        fcntl.flock(reader, fcntl.LOCK_EX | fcntl.LOCK_NB)
        assert give_back(path)
    assert said == read(path)


def test_a_directory_that_is_not_there_is_said(tmp_path):
    with pytest.raises(KernelError, match=r"resolv\.conf cannot be taken over or given back: No such file"):
        takeover(OURS, tmp_path / "nowhere/resolv.conf")


def test_a_pipe_is_no_configuration_and_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "resolv.conf")
    assert ResolvConf() == read(tmp_path / "resolv.conf")


@pytest.mark.netns
def test_a_mount_point_is_left_as_it_is(tmp_path):
    """`ip netns exec` mounts /etc/netns/NAME/resolv.conf there."""
    path, mounted = tmp_path / "resolv.conf", tmp_path / "other"
    path.write_text(CONTENT)
    mounted.write_text("nameserver 9.9.9.9\n")
    code = """
import subprocess, sys
from ipaddress import ip_address
from pathlib import Path
from tunsplit.errors import KernelError
from tunsplit.kernel.resolvconf import takeover
path = Path(sys.argv[1])
subprocess.run(["mount", "--bind", sys.argv[2], path], check=True)
try:
    takeover([ip_address("::1")], path)
except KernelError as error:
    print(error)
print(path.read_text(), sorted(one.name for one in path.parent.iterdir()))
"""
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", code, path, mounted], capture_output=True, text=True, check=True
    )
    assert "is a mount point of its own" in done.stdout
    assert "nameserver 9.9.9.9\n ['other', 'resolv.conf']" in done.stdout
    assert CONTENT == path.read_text()
