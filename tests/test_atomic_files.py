import fcntl
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from qpa.errors import DirectoryError
from qpa.store.atomic_files import (
    TEMPORARY_PREFIX,
    locked_directory,
    new_directory,
    remove_leftovers,
    sha256_of,
    write_file,
)


def entries(directory):
    return sorted(entry.name for entry in directory.iterdir())


def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")


def test_sha256_of_a_file_longer_than_one_block(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_file_is_written_replaced_and_readable_by_all(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_file(path, b"one")
    write_file(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert entries(path.parent) == ["file"]


@pytest.mark.parametrize("broken", ["fsync", "fdopen"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, broken):
    path = tmp_path / "file"
    write_file(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, broken, fail)
        with pytest.raises(OSError, match="No space left"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert entries(tmp_path) == ["file"]


def test_a_file_does_not_replace_a_directory(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError, match="taken"):
        write_file(tmp_path / "taken", b"new")
    assert entries(tmp_path) == ["taken"]


def test_a_directory_appears_only_at_the_end(tmp_path):
    path = tmp_path / "runs" / "bard"
    with new_directory(path) as work:
        assert work.parent == path.parent
        assert work.name.startswith(TEMPORARY_PREFIX)
        (work / "inner").mkdir(mode=0o700)
        (work / "inner" / "file").write_bytes(b"content")
        assert not path.exists()
    assert (path / "inner" / "file").read_bytes() == b"content"
    assert entries(path.parent) == ["bard"]
    modes = [stat.S_IMODE(entry.stat().st_mode) for entry in (path, path / "inner", path / "inner" / "file")]
    assert modes == [0o755, 0o755, 0o644]


def test_an_existing_directory_is_there_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    with new_directory(path) as work:
        (work / "new").write_bytes(b"new")
        assert entries(path) == ["old"]
    assert entries(path) == ["new"]
    assert entries(tmp_path) == ["bard"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_everything_as_it_was(tmp_path, error):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    with pytest.raises(error), new_directory(path) as work:
        (work / "new").write_bytes(b"new")
        raise error
    assert entries(path) == ["old"]
    assert entries(tmp_path) == ["bard"]


def test_a_disk_that_fills_up_at_the_end_leaves_everything_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"), new_directory(path) as work:
        (work / "new").write_bytes(b"new")
    assert entries(path) == ["old"]
    assert entries(tmp_path) == ["bard"]


@pytest.mark.parametrize("n_renames", [0, 1])
def test_a_rename_that_fails_brings_the_old_directory_back(tmp_path, monkeypatch, n_renames):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    rename, targets = Path.rename, []

    def fail_once(self, target):
        targets.append(target)
        return fail() if len(targets) == n_renames + 1 else rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(OSError, match="No space left"), new_directory(path) as work:
        (work / "new").write_bytes(b"new")
    assert entries(path) == ["old"]
    assert entries(tmp_path) == ["bard"]


def test_an_old_directory_that_cannot_be_brought_back_at_once_is_by_the_next_command(tmp_path, monkeypatch):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    rename, targets = Path.rename, []

    def fail_from_the_second(self, target):
        targets.append(target)
        return fail() if len(targets) > 1 else rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_from_the_second)
    with pytest.raises(OSError, match="No space left"), new_directory(path):
        pass
    monkeypatch.undo()
    remove_leftovers(tmp_path)
    assert entries(tmp_path) == ["bard"]
    assert entries(path) == ["old"]


def test_a_directory_that_another_process_made_first_is_kept_where_that_is_asked_for(tmp_path):
    path = tmp_path / "graph"
    with new_directory(path, keep_existing=True) as work:
        (work / "mine").write_bytes(b"mine")
        with new_directory(path, keep_existing=True) as other:
            (other / "theirs").write_bytes(b"theirs")
    assert entries(path) == ["theirs"]
    assert entries(tmp_path) == ["graph"]


def test_what_is_to_be_kept_but_is_no_directory_is_an_error(tmp_path):
    (tmp_path / "graph").write_bytes(b"a file")
    with pytest.raises(OSError, match="graph"), new_directory(tmp_path / "graph", keep_existing=True) as work:
        (work / "mine").write_bytes(b"mine")
    assert entries(tmp_path) == ["graph"]


# Locks


def test_a_lock_of_a_replaced_directory_leaves_the_lock_of_the_new_one(tmp_path):
    path = tmp_path / "bard"
    path.mkdir()
    with locked_directory(path, "nobody", "somebody"):
        path.rename(tmp_path / "old")
        path.mkdir()
        (path / ".lock").touch()
    assert entries(path) == [".lock"]


def test_a_lock_whose_file_was_removed_before_it_was_locked_is_taken_again(tmp_path, monkeypatch):
    """Another process may let go of the lock, and remove its file, between the opening and the locking."""
    flock, lock = fcntl.flock, tmp_path / ".lock"

    def remove_first(*arguments):
        monkeypatch.setattr(fcntl, "flock", flock)
        lock.unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked_directory(tmp_path, "one", "two"):
        with pytest.raises(DirectoryError, match="two"), locked_directory(tmp_path, "one", "two"):
            pytest.fail("two hold the lock")
        assert entries(tmp_path) == [".lock"]
    assert entries(tmp_path) == []


# What killed processes leave

KILLED = """
import os, signal, sys
from pathlib import Path
from qpa.store.atomic_files import new_directory, write_file

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

what, path = sys.argv[1], Path(sys.argv[2])
if what == "file":
    os.fsync = die
    write_file(path, b"half")
rename = Path.rename
with new_directory(path) as work:
    (work / "inner").mkdir()
    (work / "inner" / "file").write_bytes(b"new")
    if what == "directory":
        die()
    n_renames = {"before the swap": 0, "within the swap": 1}[what]
    targets = []
    Path.rename = lambda self, to: die() if len(targets) == n_renames else targets.append(rename(self, to))
"""


def killed(what, path):
    done = subprocess.run([sys.executable, "-c", KILLED, what, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    left = [name for name in entries(path.parent) if name.startswith(TEMPORARY_PREFIX)]
    assert left
    return left


@pytest.mark.parametrize("what", ["file", "directory"])
@pytest.mark.parametrize("next_command", ["file", "directory"])
def test_the_next_command_removes_what_a_killed_one_left(tmp_path, what, next_command):
    killed(what, tmp_path / "bard")
    killed(what, tmp_path / "bard")
    if next_command == "file":
        write_file(tmp_path / "next", b"next")
    else:
        with new_directory(tmp_path / "next"):
            assert len(entries(tmp_path)) == 1
    assert entries(tmp_path) == ["next"]


@pytest.mark.parametrize("what", ["before the swap", "within the swap"])
def test_a_directory_whose_replacement_was_killed_gets_its_name_back(tmp_path, what):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    killed(what, path)
    assert path.exists() == (what == "before the swap")
    write_file(tmp_path / "next", b"next")
    assert entries(tmp_path) == ["bard", "next"]
    assert (path / "old").read_bytes() == b"old"


def test_a_replaced_directory_is_removed_where_the_new_one_has_its_name(tmp_path):
    path = tmp_path / "bard"
    path.mkdir()
    (path / "old").write_bytes(b"old")
    killed("within the swap", path)
    path.mkdir()
    remove_leftovers(tmp_path)
    assert entries(tmp_path) == ["bard"]
    assert entries(path) == []


LIVING = """
import os, sys
from pathlib import Path
from qpa.store.atomic_files import new_directory, write_file

def wait(*_):
    print("at work", flush=True)
    sys.stdin.readline()

what, path = sys.argv[1], Path(sys.argv[2])
if what == "file":
    chmod = Path.chmod
    Path.chmod = lambda self, mode: (wait(), chmod(self, mode))
    write_file(path, b"whole")
else:
    with new_directory(path) as work:
        (work / "file").write_bytes(b"whole")
        wait()
"""


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_a_living_process_works_on_is_left_alone(tmp_path, what):
    command = [sys.executable, "-c", LIVING, what, str(tmp_path / "bard")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "at work\n"
        (work,) = entries(tmp_path)
        killed("directory", tmp_path / "bard")
        write_file(tmp_path / "one", b"one")
        with new_directory(tmp_path / "two"):
            pass
        assert entries(tmp_path) == [work, "one", "two"]
        process.stdin.write("go on\n")
    assert process.returncode == 0
    assert entries(tmp_path) == ["bard", "one", "two"]
    assert (tmp_path / "bard" / ("" if what == "file" else "file")).read_bytes() == b"whole"


RACING = """
import sys
from pathlib import Path
from qpa.store.atomic_files import new_directory, write_file

folder, name = Path(sys.argv[1]), sys.argv[2]
for index in range(60):
    with new_directory(folder / f"{name}-{index}") as work:
        write_file(work / "file", name.encode())
    write_file(folder / f"{name}-{index}.txt", name.encode())
    with new_directory(folder / name) as work:
        write_file(work / "file", b"%d" % index)
"""


def test_processes_that_race_lose_nothing_of_each_other(tmp_path):
    commands = [[sys.executable, "-c", RACING, str(tmp_path), name] for name in "abcd"]
    processes = [subprocess.Popen(command) for command in commands]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    expected = [f"{name}{rest}" for name in "abcd" for i in range(60) for rest in (f"-{i}", f"-{i}.txt")]
    assert entries(tmp_path) == sorted(["a", "b", "c", "d", *expected])
    assert {(tmp_path / name / "file").read_bytes() for name in "abcd"} == {b"59"}


@pytest.mark.parametrize("what", ["file", "directory"])
@pytest.mark.parametrize("moment", ["made", "opened"])
def test_what_was_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path, monkeypatch, what, moment
):
    """Another process may look between the making and the locking."""
    removed = []

    def first_remove(original):
        def run(*arguments, **options):
            result = original(*arguments, **options) if moment == "made" else None
            if not removed:
                removed.extend(entries(tmp_path))
                for name in removed:
                    entry = tmp_path / name
                    entry.rmdir() if entry.is_dir() else entry.unlink()
            return original(*arguments, **options) if moment == "opened" else result

        return run

    if moment == "opened":
        monkeypatch.setattr(fcntl, "flock", first_remove(fcntl.flock))
    else:
        maker = "mkstemp" if what == "file" else "mkdtemp"
        monkeypatch.setattr(tempfile, maker, first_remove(getattr(tempfile, maker)))
    if what == "file":
        write_file(tmp_path / "bard", b"whole")
    else:
        with new_directory(tmp_path / "bard"):
            pass
    assert len(removed) == 1
    assert entries(tmp_path) == ["bard"]


def test_nothing_else_is_removed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    others = ("folder/.incomplete-download", "folder/incomplete-thesis", "folder/.incomplete", "folder/mine")
    for name in ("outside/precious", *others):
        (tmp_path / name).mkdir(parents=True)
    (folder / f"{TEMPORARY_PREFIX}link").symlink_to(outside)
    (folder / f"{TEMPORARY_PREFIX}broken").symlink_to(tmp_path / "nowhere")
    (folder / "mine" / f"{TEMPORARY_PREFIX}below").mkdir()
    before = entries(folder)
    (folder / f"{TEMPORARY_PREFIX}left").mkdir()
    (folder / f"{TEMPORARY_PREFIX}left" / "link").symlink_to(outside)
    os.mkfifo(folder / f"{TEMPORARY_PREFIX}pipe")
    remove_leftovers(folder)
    assert entries(folder) == before
    assert entries(outside) == ["precious"]
    assert entries(folder / "mine") == [f"{TEMPORARY_PREFIX}below"]


def test_a_directory_that_is_not_there_has_no_leftovers(tmp_path):
    remove_leftovers(tmp_path / "nowhere")
    assert entries(tmp_path) == []


@pytest.fixture
def folder_of_an_ordinary_user():
    """Return a directory, and let this process be a user whom write protection stops."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, 65534, -1)
        os.seteuid(65534)
    yield folder
    if is_root:
        os.seteuid(0)
    shutil.rmtree(folder)


def test_a_write_protected_leftover_is_left_alone(folder_of_an_ordinary_user):
    folder = folder_of_an_ordinary_user
    protected = {folder / f"{TEMPORARY_PREFIX}{mode:03o}": mode for mode in (0o000, 0o500)}
    for path, mode in protected.items():
        path.mkdir()
        (path / "file").write_bytes(b"left")
        path.chmod(mode)
    (folder / f"{TEMPORARY_PREFIX}other").mkdir()
    write_file(folder / "next", b"next")
    with new_directory(folder / "bard"):
        pass
    assert entries(folder) == [*(path.name for path in protected), "bard", "next"]
    for path in protected:
        path.chmod(0o700)
        assert entries(path) == ["file"]


def test_without_locks_everything_is_written_and_nothing_is_removed(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    (tmp_path / f"{TEMPORARY_PREFIX}left").mkdir()
    monkeypatch.setattr(fcntl, "flock", no_locks)
    write_file(tmp_path / "file", b"content")
    with new_directory(tmp_path / "bard") as work:
        (work / "inner").write_bytes(b"content")
    assert entries(tmp_path) == [f"{TEMPORARY_PREFIX}left", "bard", "file"]
