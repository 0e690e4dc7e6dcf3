import hashlib
import os
import stat
from pathlib import Path

import pytest

from qpa.store.atomic_files import TEMPORARY_PREFIX, new_directory, sha256_of, write_file


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
