"""Expanded adapters in a bounded folder."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.random_compact import write_adapters, write_basis, write_layout
from qpa.errors import DocumentError, OptionError, QpaError
from qpa.serve.basis import Basis
from qpa.serve.cache import GRACE_S, Cache
from qpa.serve.expansion import expand
from qpa.serve.resolution import Adapters
from qpa.serve.store import Store
from tests.losing_store import LosesOne

SHAPES = {"model.layers.0.q_proj": (6, 5), "model.layers.0.o_proj": (5, 6)}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def basis(tmp_path: Path) -> Basis:
    return write_basis(tmp_path / "basis", SHAPES)


@pytest.fixture
def files(tmp_path: Path, basis: Basis) -> list[Path]:
    store = tmp_path / "store"
    return write_adapters(store, ["a", "b", "c", "d"], basis, write_layout(store, basis))


@pytest.fixture
def cache(tmp_path: Path, basis: Basis) -> Cache:
    return Cache(tmp_path / "cache", basis)


def entries(cache: Cache) -> set[str]:
    return {path.name for path in cache.directory.iterdir()} - {"sources", "locks"}


def make_old(path: Path, age_s: float) -> None:
    """Let an entry have been asked for some seconds before now."""
    used = path.stat().st_mtime - age_s
    os.utime(path, (used, used))


def n_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def test_an_entry_is_what_the_expansion_writes(cache, files, basis, tmp_path):
    expand(files[0], basis, tmp_path / "plain")
    entry = cache.get(files[0])
    for name in ("adapter_config.json", WEIGHTS):
        assert (entry.path / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert entry.path.is_absolute()


def test_it_is_expanded_once(cache, files):
    first = (cache.get(files[0]).path / WEIGHTS).stat()
    again = (cache.get(files[0]).path / WEIGHTS).stat()
    assert (first.st_ino, first.st_mtime_ns) == (again.st_ino, again.st_mtime_ns)


def test_a_file_that_changed_and_another_basis_are_other_entries(cache, files, tmp_path):
    old = cache.get(files[0])
    files[0].write_bytes(files[1].read_bytes())
    new = cache.get(files[0])
    assert old.path != new.path and new.path == cache.get(files[1]).path
    other = write_basis(tmp_path / "other", SHAPES, seed=1)
    store = tmp_path / "other-store"
    (file,) = write_adapters(store, ["a"], other, write_layout(store, other))
    assert Cache(cache.directory, other).get(file).path.parent == cache.directory
    assert len(entries(cache)) == 3


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no-digests", "empty-digests", "whole"])
def test_a_damaged_entry_is_made_again(cache, files, damage):
    path = cache.get(files[0]).path
    expected = load_file(path / WEIGHTS)
    content = bytearray((path / WEIGHTS).read_bytes())
    content[-1] ^= 1
    if damage == "flip":
        (path / WEIGHTS).write_bytes(content)
    elif damage == "cut":
        (path / WEIGHTS).write_bytes(content[:20])
    elif damage == "remove":
        (path / "adapter_config.json").unlink()
    elif damage == "no-digests":
        (path / "expanded.json").unlink()
    elif damage == "empty-digests":
        (path / "expanded.json").write_text("{}")
    else:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        path.write_text("a file")
    found = load_file(cache.get(files[0]).path / WEIGHTS)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)
    assert "expanded.json" in {file.name for file in path.iterdir()}


def test_the_least_recently_used_goes_first(cache, files, basis):
    paths = [cache.get(file).path for file in files[:3]]
    for path, age_s in zip(paths, (300, 200, 100), strict=True):
        make_old(path, age_s)
    cache.get(files[0])  # asked for again, so that it is the newest
    small = Cache(cache.directory, basis, 2 * n_bytes(paths[0]) + 10)
    new = small.get(files[3])
    assert entries(cache) == {paths[0].name, new.path.name}


def test_what_was_asked_for_within_the_last_seconds_stays(cache, files, basis):
    tight = Cache(cache.directory, basis, 1)
    paths = [tight.get(file).path for file in files[:3]]
    assert all(path.is_dir() for path in paths)
    make_old(paths[0], GRACE_S + 5)
    tight.get(files[3])
    assert [path.is_dir() for path in paths] == [False, True, True]


def test_what_is_not_of_the_cache_stays(cache, files, basis):
    others = [cache.directory / name for name in ("photos", "a-b", f"{'0' * 16}-{'1' * 63}")]
    for other in others:
        other.mkdir(parents=True)
        (other / "file").write_text("kept")
        make_old(other, 10 * GRACE_S)
    make_old(cache.get(files[0]).path, 5 * GRACE_S)
    Cache(cache.directory, basis, 1).get(files[1])
    assert all((other / "file").exists() for other in others)
    assert len(list(cache.directory.glob("*-*"))) == 3


def test_what_cannot_be_removed_stays_and_hinders_nobody(cache, files, basis, tmp_path):
    old = cache.get(files[0]).path
    old.rename(tmp_path / "elsewhere")
    old.symlink_to(tmp_path / "elsewhere")
    make_old(old, 5 * GRACE_S)
    new = Cache(cache.directory, basis, 1).get(files[1]).path
    assert (new / WEIGHTS).is_file() and (old / WEIGHTS).is_file()


@pytest.mark.parametrize("emptied", range(3))
def test_what_is_left_of_one_entry_does_not_hide_the_size_of_the_others(cache, files, basis, emptied):
    paths = [cache.get(file).path for file in files[:3]]
    for file in paths[emptied].iterdir():
        file.unlink()
    for path in paths:
        make_old(path, 5 * GRACE_S)
    new = Cache(cache.directory, basis, 1).get(files[3]).path
    assert entries(cache) == {new.name}


def test_a_full_disk_lets_the_old_entries_go_whatever_the_bound(small_disk, basis, files):
    cache = Cache(small_disk("size=64k") / "cache", basis)
    paths = []
    for file in files:
        paths.append(cache.get(file).path)
        make_old(paths[-1], 5 * GRACE_S)
    assert (paths[-1] / WEIGHTS).is_file() and not paths[0].exists()
    assert cache.again(paths[0]) and (paths[0] / WEIGHTS).is_file()


def test_who_has_opened_a_file_keeps_it(cache, files, basis):
    path = cache.get(files[0]).path
    expected = (path / WEIGHTS).read_bytes()
    with (path / WEIGHTS).open("rb") as stream:
        make_old(path, GRACE_S + 5)
        Cache(cache.directory, basis, 1).get(files[1])
        assert not path.exists() and stream.read() == expected


def test_a_removed_entry_is_made_again_also_where_the_store_has_lost_it(cache, files):
    entry = cache.get(files[0])
    expected = (entry.path / WEIGHTS).read_bytes()
    for file in entry.path.iterdir():
        file.unlink()
    entry.path.rmdir()
    files[0].unlink()
    assert cache.again(entry.path) and (entry.path / WEIGHTS).read_bytes() == expected


def test_a_path_that_was_not_handed_out_is_left_alone(cache, files, tmp_path):
    entry = cache.get(files[0])
    others = (tmp_path / "elsewhere", entry.path.with_name("name"), cache.directory / f"{'0' * 16}-x")
    assert not any(map(cache.again, others)) and len(entries(cache)) == 1


def test_an_adapter_of_another_basis_is_refused_and_leaves_nothing(cache, tmp_path):
    other = write_basis(tmp_path / "other", SHAPES, seed=1)
    store = tmp_path / "other-store"
    (file,) = write_adapters(store, ["a"], other, write_layout(store, other))
    with pytest.raises(DocumentError, match="basis"):
        cache.get(file)
    assert not cache.directory.exists()


def test_a_damaged_file_or_layout_is_refused(cache, files):
    files[0].write_bytes(files[0].read_bytes()[:-3])
    with pytest.raises(DocumentError, match="SHA-256"):
        cache.get(files[0])
    (layout,) = (files[1].parent / "layouts").iterdir()
    layout.write_text("{}")
    with pytest.raises(DocumentError, match="layout"):
        cache.get(files[1])


def test_a_damaged_copy_of_a_source_is_copied_again(cache, files):
    entry = cache.get(files[0])
    (cache.directory / "sources" / entry.digest).write_bytes(b"QPAC")
    (entry.path / WEIGHTS).unlink()
    cache.get(files[0])
    assert (cache.directory / "sources" / entry.digest).read_bytes() == files[0].read_bytes()


def test_threads_that_ask_at_once_expand_once(cache, files):
    found: list[int] = []
    barrier = threading.Barrier(8)

    def ask() -> None:
        barrier.wait()
        found.append((cache.get(files[0]).path / WEIGHTS).stat().st_ino)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len({*found}) == 1


def ask_in_process(basis: Path, cache: Path, files: list[Path], n_bytes: int, out: Path) -> None:
    """Ask for every file several times, and write what was found."""
    opened = Cache(cache, Basis.open(basis), n_bytes)
    found = []
    for _ in range(5):
        for file in files:
            path = opened.get(file).path
            found.append((file.name, (path / WEIGHTS).stat().st_ino))
    out.write_text(json.dumps(found))


def test_processes_that_ask_at_once_expand_once(cache, files, basis, tmp_path):
    context = multiprocessing.get_context("spawn")
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    processes = [
        context.Process(
            target=ask_in_process, args=(basis.directory, cache.directory, files, cache.n_bytes, out)
        )
        for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    inodes: dict[str, set[int]] = {}
    for out in outs:
        for name, inode in json.loads(out.read_text()):
            inodes.setdefault(name, set()).add(inode)
    assert {name: len(found) for name, found in inodes.items()} == {"a": 1, "b": 1, "c": 1, "d": 1}


def sweep_in_process(basis: Path, cache: Path, files: list[Path], out: Path) -> None:
    """Ask for every file in a cache without room, all of whose entries are old."""
    opened = Cache(cache, Basis.open(basis), 1)
    n_whole = 0
    for _ in range(10):
        for file in files:
            path = opened.get(file).path
            n_whole += (path / WEIGHTS).is_file()
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, (0, 0))
    out.write_text(str(n_whole))


def test_processes_that_remove_the_same_entries_do_not_fail(cache, files, basis, tmp_path):
    context = multiprocessing.get_context("spawn")
    outs = [tmp_path / f"out-{number}" for number in range(3)]
    processes = [
        context.Process(target=sweep_in_process, args=(basis.directory, cache.directory, files, out))
        for out in outs
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0] and all(out.read_text() for out in outs)


def test_a_full_disk_leaves_nothing_half_written(small_disk, basis, files):
    cache = Cache(small_disk("size=28k") / "cache", basis)
    n_made = 0
    with pytest.raises((QpaError, OSError)):
        for file in files:
            cache.get(file)
            n_made += 1
    assert all((path / "expanded.json").exists() for path in cache.directory.glob("*-*/")) or n_made < 4


# What the environment says


def variables(tmp_path: Path, **others: str) -> dict[str, str]:
    found = {"QPA_STORE": "store", "QPA_BASIS": "basis", "QPA_CACHE": "cache"}
    return {name: str(tmp_path / value) for name, value in found.items()} | others


def test_adapters_are_found_by_name(tmp_path, files):
    adapters = Adapters.from_environment(variables(tmp_path))
    assert adapters is not None
    found = adapters.expanded("a")
    assert found is not None and (found.path / WEIGHTS).is_file()
    for name in ("unknown", "../store/a", "layouts", "", "a\n"):
        assert adapters.expanded(name) is None


def test_a_directory_is_made_again_after_the_whole_cache_was_removed(tmp_path, files):
    adapters = Adapters.from_environment(variables(tmp_path))
    assert adapters is not None
    found = adapters.expanded("a")
    assert found is not None
    shutil.rmtree(tmp_path / "cache")
    adapters.again(tmp_path / "elsewhere")
    assert not (tmp_path / "cache").exists()
    adapters.again(found.path)
    assert (found.path / WEIGHTS).is_file()


def test_an_adapter_that_is_removed_meanwhile_does_not_hide_the_others(tmp_path, files):
    adapters = Adapters(LosesOne(tmp_path / "store"), tmp_path / "basis", tmp_path / "cache")
    found = adapters.expanded("d")
    assert found is not None
    shutil.rmtree(tmp_path / "cache")
    adapters.again(found.path)
    assert (found.path / WEIGHTS).is_file()


def test_without_a_store_there_is_nothing_to_serve(tmp_path):
    assert Adapters.from_environment({"QPA_BASIS": str(tmp_path)}) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"QPA_BASIS": ""}, "QPA_BASIS"),
        ({"QPA_BASIS": "nowhere"}, "basis.json"),
        ({"QPA_STORE": "nowhere"}, "nowhere"),
        ({"QPA_CACHE_BYTES": "10GB"}, "QPA_CACHE_BYTES"),
        ({"QPA_CACHE_BYTES": "-1"}, "QPA_CACHE_BYTES"),
        ({"QPA_CACHE": f"{__file__}/cache"}, "QPA_CACHE"),
        ({"QPA_CACHE": "~nobody-of-this-name/cache"}, "QPA_CACHE"),
    ],
)
def test_wrong_variables_are_refused_at_the_start(tmp_path, files, wrong, words):
    with pytest.raises(OptionError, match=words):
        Adapters.from_environment(variables(tmp_path, **wrong))


def test_a_cache_that_cannot_be_written_is_refused_at_the_start(small_disk, tmp_path, files):
    with pytest.raises(OptionError, match="QPA_CACHE"):
        Adapters.from_environment(variables(tmp_path, QPA_CACHE=str(small_disk("ro"))))


def test_a_damaged_basis_is_told_with_the_first_adapter(tmp_path, files, basis):
    basis.arrays.write_bytes(basis.arrays.read_bytes()[:-1])
    adapters = Adapters(Store.open(tmp_path / "store"), tmp_path / "basis", tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(DocumentError, match="SHA-256"):
            adapters.expanded("a")
