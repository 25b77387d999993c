"""`--save`: what is said at run time goes into the file, which stays its owner's."""

import os
import stat

import pytest

from tests.control_server import NOBODY, as_user
from tests.switching_server import FILE
from tunsplit.cli import saving
from tunsplit.config import parse
from tunsplit.errors import ConfigError, PermissionMissing, TunsplitError


def test_saving_keeps_the_file_as_it_is_but_for_the_entry(invoke, listed_file, switching):
    assert 0 == invoke("app", "add", "/bin/sh", "--save").exit_code
    assert FILE + '\n[[app]]\npath = "/bin/sh"\n' == listed_file.read_text()
    assert "/bin/sh" in switching.paths

    assert 0 == invoke("app", "remove", "--save", "/bin/sh").exit_code
    assert FILE == listed_file.read_text()

    assert 0 == invoke("app", "clear", "--save").exit_code
    assert FILE.split("\n[[app]]")[0] == listed_file.read_text().rstrip("\n") + "\n"
    assert [listed_file.name] == sorted(path.name for path in listed_file.parent.glob("*.toml*"))


def test_what_is_said_without_save_stays_out_of_the_file(invoke, listed_file):
    invoke("app", "add", "/opt/experiment")
    invoke("app", "add", "/bin/sh", "--save")

    assert ["/usr/bin/firefox", "/bin/sh"] == [app.path for app in parse(listed_file.read_text()).apps]
    invoke("app", "add", "/opt/experiment", "--save")  # though it is on the list
    assert 3 == len(parse(listed_file.read_text()).apps)


def test_mode_owner_and_symlink_stay(invoke, listed_file, tmp_path):
    if os.geteuid() == 0:
        os.chown(listed_file, NOBODY, 1)
    before = listed_file.stat()
    link = tmp_path / "link.toml"
    link.symlink_to(listed_file.name)
    assert saving.rewrite(str(link), lambda text: text + "# more\n")
    after = listed_file.stat()

    assert link.is_symlink()
    assert FILE + "# more\n" == listed_file.read_text()
    assert (before.st_mode, before.st_uid, before.st_gid) == (after.st_mode, after.st_uid, after.st_gid)
    assert 0o640 == stat.S_IMODE(after.st_mode)
    assert before.st_ino != after.st_ino


def test_what_changes_nothing_writes_nothing(listed_file):
    before = listed_file.stat()

    assert not saving.rewrite(str(listed_file), lambda text: text)
    assert before.st_ino == listed_file.stat().st_ino


def refuse(text: str) -> str:
    raise ConfigError("no")


def test_what_cannot_be_edited_is_left_alone(listed_file):
    with pytest.raises(ConfigError, match="no"):
        saving.rewrite(str(listed_file), refuse)
    assert FILE == listed_file.read_text()


def test_a_failed_write_leaves_the_old_file_and_no_other(listed_file, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TunsplitError, match=r"not saved, and nothing changed: No space left on device"):
        saving.rewrite(str(listed_file), lambda text: text + "# more\n")
    assert FILE == listed_file.read_text()
    assert [] == list(listed_file.parent.glob(".tunsplit*"))


@pytest.mark.netns
def test_who_may_not_write_the_file_is_told_so(listed_file):
    listed_file.parent.chmod(0o755)
    listed_file.chmod(0o644)
    for directory in listed_file.parents:
        if not directory.stat().st_mode & 1:
            directory.chmod(0o711)
    with pytest.raises(PermissionMissing, match="not saved, and nothing changed: Permission denied; run it as root"):
        as_user(NOBODY, [], lambda: saving.rewrite(str(listed_file), lambda text: text + "#"))
    assert FILE == listed_file.read_text()


def test_what_cannot_be_saved_does_not_happen(invoke, listed_file, switching):
    listed_file.write_text("app = []\n" + FILE.partition("\n[[app]]")[0])
    result = invoke("app", "add", "/bin/sh", "--save")

    assert (2, "") == (result.exit_code, result.stdout)
    assert "edit the list there by hand" in result.stderr
    assert "/bin/sh" not in switching.paths
