import errno
import os
import stat
import subprocess
import sys

import pytest

from tdc_tvm.errors import TdcError
from tdc_tvm.files import check_output, lock_folder, write_atomic


def write_and_raise(path, error):
    with write_atomic(path) as temporary:
        temporary.write_text("half")
        raise error


def test_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "plan.json"
    target.write_text("old")
    with write_atomic(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".json"
        temporary.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_new_files_get_the_permissions_of_the_umask(tmp_path):
    plain, ours = tmp_path / "plain", tmp_path / "ours"
    plain.touch()
    with write_atomic(ours) as temporary:
        temporary.write_text("x")
    assert stat.S_IMODE(ours.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)


@pytest.mark.parametrize("raised", [ValueError, KeyboardInterrupt, FileNotFoundError])
def test_a_failing_body_changes_nothing(tmp_path, raised):
    target = tmp_path / "plan.json"
    target.write_text("old")
    with pytest.raises(raised):
        write_and_raise(target, raised())
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_tool_may_create_the_file_anew(tmp_path):
    with write_atomic(tmp_path / "model.so") as temporary:
        temporary.unlink()
        temporary.write_bytes(b"linked")
    assert (tmp_path / "model.so").read_bytes() == b"linked"


def test_follows_symbolic_links(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    with write_atomic(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_refuses_a_missing_directory_and_what_is_not_a_file(tmp_path):
    with pytest.raises(TdcError, match="does not exist; create it"), write_atomic(tmp_path / "absent" / "x"):
        pass
    for target in (tmp_path, "/dev/null"):
        with pytest.raises(TdcError, match="not a regular file"), write_atomic(target):
            pass


def test_no_permission_is_the_users_mistake(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(TdcError, match="no permission"), write_atomic(tmp_path / "x"):
        pass


def test_a_read_only_file_system_is_the_users_mistake(tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, "read-only", str(path))

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(TdcError, match="no permission to write"), write_atomic(tmp_path / "x"):
        pass


def test_a_name_that_is_too_long_is_the_users_mistake(tmp_path):
    with pytest.raises(TdcError, match="File name too long; choose another"), write_atomic(tmp_path / ("x" * 300)):
        pass
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(("number", "message"), [(errno.ENOSPC, "no space left"), (errno.EFBIG, "see ulimit -f")])
def test_a_full_disk_is_the_users_mistake_and_leaves_nothing(tmp_path, number, message):
    with pytest.raises(TdcError, match=message):
        write_and_raise(tmp_path / "x", OSError(number, "full"))
    assert not os.listdir(tmp_path)


def test_a_folder_where_no_file_can_be_made():
    with pytest.raises(TdcError, match=r"cannot write /proc/x\.so: No such file .*; choose another"):
        check_output("/proc/x.so", "a library", (".so",))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plan.txt", r"the name of a plan ends in \.json or \.yaml; found"),
        ("source.json", "source.json would be lost; choose another name"),
        ("link.json", "source.json would be lost"),
        ("absent/plan.json", "create it first"),
        ("folder.json", "not a regular file"),
    ],
)
def test_outputs_are_refused_ahead_of_the_work(tmp_path, name, message):
    (tmp_path / "source.json").write_text("old")
    (tmp_path / "link.json").symlink_to("source.json")
    (tmp_path / "folder.json").mkdir()
    before = sorted(os.listdir(tmp_path))
    sources = [tmp_path / "folder.json" / ".." / "source.json"]
    with pytest.raises(TdcError, match=message):
        check_output(tmp_path / name, "a plan", (".json", ".yaml"), sources)
    check_output(tmp_path / "plan.json", "a plan", (".json", ".yaml"), sources)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "source.json").read_text() == "old"


def test_one_process_at_a_time_holds_a_folder(tmp_path):
    code = "import sys; from tdc_tvm.files import lock_folder\nwith lock_folder(sys.argv[1]): print(); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(TdcError, match=r"another process is at work in .*; wait for it"), lock_folder(tmp_path):
        pass
    other.kill()
    other.communicate()
    for _ in range(2):
        with lock_folder(tmp_path):
            pass
    with pytest.raises(TdcError, match="cannot write"), lock_folder(tmp_path / "absent"):
        pass
