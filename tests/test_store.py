"""A folder of compact adapters: names, listing, adding and verifying."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.random_compact import write_adapters, write_basis, write_layout
from qpa.errors import DirectoryError, DocumentError, QpaError
from qpa.serve.basis import Basis
from qpa.serve.compact import Compact
from qpa.serve.store import Store, is_name
from tests.command_line import Cli
from tests.losing_store import LosesOne

SHAPES = {"model.layers.0.q_proj": (6, 5), "model.layers.0.o_proj": (5, 6)}
NAMES = ("tenant-1", "tenant-2", "b.c_d")


@pytest.fixture
def basis(tmp_path: Path) -> Basis:
    return write_basis(tmp_path / "basis", SHAPES)


@pytest.fixture
def store(tmp_path: Path, basis: Basis) -> Store:
    folder = tmp_path / "store"
    write_adapters(folder, NAMES, basis, write_layout(folder, basis))
    return Store.open(folder)


@pytest.mark.parametrize("name", ["a", "tenant-17", "0", "A.b-C_9", "a" * 128])
def test_a_name_is_a_plain_word(name):
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", ".hidden", "-x", "_x", "a/b", "../a", "/etc/passwd", "a\n", "a b", "a\0", "ä"),
        *("a" * 129, "layouts", "a\\b", "a%2fb"),
    ],
)
def test_other_names_are_refused_wherever_they_are_given(store, name):
    assert not is_name(name) and store.find(name) is None
    with pytest.raises(DocumentError, match="letters"):
        store.path_of(name)


def test_the_list_says_what_the_heads_say(store, basis):
    entries = list(store.entries())
    assert [entry.name for entry in entries] == sorted(NAMES)
    assert {entry.basis for entry in entries} == {basis.digest.hex()}
    (layout,) = (store.directory / "layouts").iterdir()
    assert {entry.layout for entry in entries} == {layout.stem}
    # 2 circuits of 2 qubits and 2 layers, and 4 numbers of a chunk from 2 features.
    assert {entry.n_numbers for entry in entries} == {2 * 2 * 2 + 4 * 2}
    assert all(entry.n_bytes == store.path_of(entry.name).stat().st_size for entry in entries)


def test_an_adapter_that_is_removed_meanwhile_is_not_listed(store):
    assert [entry.name for entry in LosesOne(store.directory).entries()] == sorted(NAMES)


def test_listing_reads_no_numbers(store):
    for name in NAMES:  # the head stays, and most of the numbers are gone
        path = store.path_of(name)
        path.write_bytes(path.read_bytes()[:95])
    assert len(list(store.entries())) == 3


@pytest.mark.parametrize("n_kept", [0, 3, 4, 70, 74, 89])
def test_a_file_that_ends_in_its_head_is_told(store, n_kept):
    path = store.path_of("tenant-1")
    path.write_bytes(path.read_bytes()[:n_kept])
    with pytest.raises(DocumentError, match="tenant-1"):
        store.entry("tenant-1")


@pytest.mark.parametrize(("offset", "value"), [(0, 0), (4, 2), (6, 2)])
def test_a_file_of_another_format_or_version_is_told(store, offset, value):
    path = store.path_of("tenant-1")
    content = bytearray(path.read_bytes())
    content[offset] = value
    path.write_bytes(content)
    with pytest.raises(DocumentError, match="tenant-1"):
        store.entry("tenant-1")


def test_a_link_counts_where_it_stays_in_the_folder(store, tmp_path):
    (tmp_path / "outside").write_bytes(store.path_of("tenant-1").read_bytes())
    (store.directory / "alias").symlink_to("tenant-1")
    (store.directory / "out").symlink_to(tmp_path / "outside")
    (store.directory / "layout").symlink_to(next((store.directory / "layouts").iterdir()))
    (store.directory / "loop").symlink_to("loop")
    (store.directory / "folder").mkdir()
    os.mkfifo(store.directory / "pipe")
    assert store.names() == sorted([*NAMES, "alias"])
    for name in ("out", "layout", "loop", "folder", "pipe", "missing"):
        assert store.find(name) is None
    findings = list(store.verify())
    assert len(findings) == 5 and all("no file in the store's own folder" in line for line in findings)


def test_adding_copies_a_file_and_its_layout(store, tmp_path):
    other = Store(tmp_path / "other")
    other.directory.mkdir()
    added = other.add([store.path_of("tenant-1"), store.path_of("tenant-2")])
    assert [entry.name for entry in added] == ["tenant-1", "tenant-2"] and not list(other.verify())
    assert other.path_of("tenant-1").read_bytes() == store.path_of("tenant-1").read_bytes()
    other.add([store.path_of("tenant-1")])  # the same bytes again


def test_adding_refuses_all_files_where_one_is_wrong(store, tmp_path):
    other = Store(tmp_path / "other")
    other.directory.mkdir()
    damaged = store.path_of("tenant-2")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with pytest.raises(DocumentError, match="tenant-2"):
        other.add([store.path_of("tenant-1"), damaged])
    assert list(other.directory.iterdir()) == []


def test_adding_mends_a_damaged_layout(store, tmp_path):
    other = Store(tmp_path / "other")
    other.add([store.path_of("tenant-1")])
    (layout,) = (other.directory / "layouts").iterdir()
    layout.write_bytes(layout.read_bytes()[:-1])
    other.add([store.path_of("tenant-2")])
    assert not list(other.verify())


def test_adding_refuses_two_adapters_of_one_name(store, tmp_path, basis):
    other = Store(tmp_path / "other")
    write_adapters(other.directory, ["tenant-1"], basis, write_layout(other.directory, basis), seed=7)
    new = Store(tmp_path / "new")
    with pytest.raises(DocumentError, match="the name of another"):
        new.add([store.path_of("tenant-1"), other.path_of("tenant-1")])
    assert not new.directory.exists()
    new.add([store.path_of("tenant-1"), store.path_of("tenant-1")])
    assert new.names() == ["tenant-1"]


def test_a_taken_name_is_replaced_only_by_force(store, tmp_path, basis):
    other = Store(tmp_path / "other")
    write_adapters(other.directory, ["tenant-1"], basis, write_layout(other.directory, basis), seed=7)
    with pytest.raises(DocumentError, match="another adapter"):
        store.add([other.path_of("tenant-1")])
    store.add([other.path_of("tenant-1")], force=True)
    assert store.path_of("tenant-1").read_bytes() == other.path_of("tenant-1").read_bytes()


def test_adding_never_writes_through_a_link(store, tmp_path, basis):
    other = Store(tmp_path / "other")
    write_adapters(other.directory, ["new"], basis, write_layout(other.directory, basis))
    (tmp_path / "outside").write_text("kept")
    (store.directory / "new").symlink_to(tmp_path / "outside")
    with pytest.raises(DocumentError):
        store.add([other.path_of("new")])
    store.add([other.path_of("new")], force=True)
    assert (tmp_path / "outside").read_text() == "kept" and not (store.directory / "new").is_symlink()


def test_verify_says_one_line_for_each_finding(store, tmp_path, basis):
    assert list(store.verify(basis)) == []
    cut, flipped = store.path_of("tenant-1"), store.path_of("tenant-2")
    cut.write_bytes(cut.read_bytes()[:60])
    content = bytearray(flipped.read_bytes())
    content[120] ^= 4
    flipped.write_bytes(content)
    (store.directory / "bad name").write_bytes(b"")
    findings = list(store.verify(basis))
    assert [line.split(": ")[0].rpartition("/")[2] for line in findings] == [
        "bad name",
        "tenant-1",
        "tenant-2",
    ]
    assert all(len(line.splitlines()) == 1 for line in findings)


def test_any_name_makes_one_line_that_can_be_printed(store):
    for name in (b"two\nlines", b"\xff"):
        Path(os.fsdecode(os.fsencode(store.directory) + b"/" + name)).touch()
    findings = list(store.verify())
    assert len(findings) == 2 and all(line.isprintable() and line.encode() for line in findings)


def test_a_store_that_is_full_keeps_whole_adapters_alone(cli: Cli, small_disk, store):
    full = Store(small_disk("size=12k") / "store")
    assert "room" in cli.refuses("store", "add", full.directory, *map(store.path_of, NAMES))
    assert 0 < len(full.names()) < 3 and not list(full.verify())
    assert not list(full.directory.glob(".*"))


def test_a_store_that_cannot_be_written_is_one_line(cli: Cli, small_disk, store):
    disk = small_disk("size=64k")
    cli("store", "add", disk / "store", store.path_of("tenant-1"))
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "Read-only" in cli.refuses("store", "add", disk / "store", store.path_of("tenant-2"))
    code, out, _ = cli("store", "verify", disk / "store")
    assert code == 0 and out.startswith("1 adapter")


def test_verify_finds_another_basis(store, tmp_path):
    other = write_basis(tmp_path / "other", SHAPES, seed=1)
    assert len(list(store.verify(other))) == 3 and not list(store.verify())


def test_verify_finds_a_bank_that_the_basis_does_not_have(store, basis):
    path = store.path_of("tenant-1")
    path.write_bytes(replace(Compact.read(path), bank=3).as_bytes())
    assert [*store.verify()] == []
    assert [*store.verify(basis)] == [f"{path}: expected a bank of the basis, which has 1, found number 3"]


def test_verify_finds_a_layout_that_is_missing_edited_or_of_another_size(store, basis):
    (layout,) = (store.directory / "layouts").iterdir()
    content = layout.read_bytes()
    layout.unlink()
    assert all("layouts" in line for line in store.verify(basis)) and len(list(store.verify(basis))) == 3
    layout.write_bytes(content + b" ")
    assert all("SHA-256" in line for line in store.verify(basis)) and len(list(store.verify(basis))) == 3
    layout.write_bytes(content)
    larger = write_layout(store.directory, basis, n_circuits=3)
    path = store.path_of("tenant-1")
    from qpa.serve.compact import Compact

    found = Compact.read(path)
    path.write_bytes(Compact(found.basis, larger.digest, False, found.arrays).as_bytes())
    (line,) = store.verify(basis)
    assert "as its layout has" in line


def test_a_store_is_a_folder(tmp_path):
    with pytest.raises(DirectoryError):
        Store.open(tmp_path / "missing")


def test_the_command_lists_adds_and_verifies(cli: Cli, store, basis, tmp_path):
    code, out, _ = cli("store", "ls", store.directory)
    assert code == 0 and "tenant-1" in out and basis.digest.hex()[:12] in out
    code, out, _ = cli("store", "ls", store.directory, "--json")
    assert [entry["name"] for entry in json.loads(out)["adapters"]] == sorted(NAMES)
    other = tmp_path / "made" / "here"
    code, out, _ = cli("store", "add", other, store.path_of("tenant-1"), store.path_of("tenant-2"))
    assert code == 0 and "2 adapters" in out
    code, out, _ = cli("store", "verify", other, "--basis", basis.directory)
    assert (code, out) == (0, f"2 adapters in {other}: no findings\n")
    (other / "tenant-1").write_bytes(b"QPAC")
    code, out, _ = cli("store", "verify", other, "--json")
    assert code == 1 and len(json.loads(out)["findings"]) == 1
    (other / "tenant-2").unlink()
    code, out, _ = cli("store", "verify", other)
    assert code == 1 and out.splitlines()[-1] == f"1 adapter in {other}: 1 finding"
    single = tmp_path / "single"
    code, out, _ = cli("store", "add", single, store.path_of("tenant-1"))
    assert code == 0 and out.startswith("1 adapter of ")


def test_the_command_refuses_in_one_line(cli: Cli, store, tmp_path):
    assert "compact adapters to add" in cli.refuses("store", "add", store.directory)
    assert "no files for ls" in cli.refuses("store", "ls", store.directory, store.path_of("tenant-1"))
    cli.refuses("store", "ls", tmp_path / "missing")
    cli.refuses("store", "verify", store.directory, "--basis", tmp_path / "missing")
    cli.refuses("store", "add", tmp_path / "new", tmp_path / "missing")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("no folder")
    cli.refuses("store", "add", tmp_path / "file", store.path_of("tenant-2"))
    (store.directory / "tenant-1").write_bytes(b"")
    assert "tenant-1" in cli.refuses("store", "ls", store.directory)
    assert issubclass(DocumentError, QpaError)
