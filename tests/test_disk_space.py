"""What is said of a full disk: of small ones that are really full, of /dev/full, and of errors made up."""

import errno
import os
import re
from pathlib import Path

import numpy as np
import onnx_ir
import pytest
from transformers import AutoTokenizer

from qpa.bench.ledger import Book
from qpa.errors import DiskFullError, ExportError, QpaError
from qpa.exporters.onnx import base_graph
from qpa.exporters.onnx import graph as graph_module
from qpa.exporters.registry import exporter_for
from qpa.store.atomic_files import locked_directory, new_directory, write_file
from qpa.store.disk_space import room_for
from qpa.training.training_log import TrainingLog
from tests.random_adapter import random_adapter

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

SENTENCE = re.compile(
    r"(?P<path>\S+): expected room for at least (?P<needed>[\d,]+) bytes, found (?P<free>[\d,]+) bytes free"
    r" \(No space left on device\); free some space and run the same command again"
)
MORE_THAN_ANY_DISK_HAS = 1 << 62


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def parts(error: Exception) -> tuple[str, int, int]:
    """Return the file that an error names, the bytes it needs, and the bytes that are free."""
    found = SENTENCE.fullmatch(str(error))
    assert found is not None, str(error)
    needed, free = (int(found[name].replace(",", "")) for name in ("needed", "free"))
    return found["path"], needed, free


def test_a_file_that_finds_no_room_is_named_with_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFullError) as caught:
        write_file(tmp_path / "file", bytes(123_456))
    path, needed, free = parts(caught.value)
    assert (path, needed) == (str(tmp_path / "file"), 123_456) and free > 0
    assert isinstance(caught.value, QpaError) and isinstance(caught.value, OSError)
    error = caught.value
    assert (error.errno, error.strerror, error.filename) == (
        28,
        "No space left on device",
        str(tmp_path / "file"),
    )
    assert list(tmp_path.iterdir()) == []


def test_other_advice_changes_nothing_else(tmp_path):
    error = DiskFullError(tmp_path, 7, 5, "Disk quota exceeded")
    changed = error.advising("wait")
    assert str(changed) == str(error).replace("free some space and run the same command again", "wait")


def test_a_quota_is_called_a_quota(tmp_path):
    with pytest.raises(DiskFullError, match=r"bytes free \(Disk quota exceeded\)"), room_for(tmp_path, 10):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def test_where_not_even_a_name_has_room_no_bytes_are_asked_for(tmp_path):
    with pytest.raises(DiskFullError, match="expected room for one more file, found"), room_for(tmp_path):
        full()


@pytest.mark.parametrize("error", [OSError("1000 requested and 0 written"), RuntimeError("failed")], ids=str)
def test_a_library_that_gives_no_reason_is_asked_for_the_room(tmp_path, error):
    """numpy and onnxruntime, in this order."""
    with pytest.raises(DiskFullError), room_for(tmp_path / "file", MORE_THAN_ANY_DISK_HAS):
        raise error
    with pytest.raises(type(error)) as caught, room_for(tmp_path / "file", 10):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EROFS, "Read-only file system"), ValueError("no"), QpaError("a", "b", "c")],
    ids=str,
)
def test_another_error_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, room_for(tmp_path, MORE_THAN_ANY_DISK_HAS):
        raise error
    assert caught.value is error
    with pytest.raises(type(error)) as caught, new_directory(tmp_path / "bard"):
        raise error
    assert caught.value is error


def _qpa(work: Path) -> None:
    with room_for(work / "inner" / "three", 7):
        full()


def _opened(work: Path) -> None:
    raise OSError(errno.ENOSPC, "No space left on device", str(work / "inner" / "three"))


def _in_rust(work: Path) -> None:
    raise Exception("No space left on device (os error 28)")


@pytest.mark.parametrize(
    ("write", "name", "n_more"),
    [(_qpa, "inner/three", 7), (_opened, "inner/three", 0), (full, ".", 0), (_in_rust, ".", 0)],
)
def test_a_directory_needs_the_room_of_all_its_files(tmp_path, write, name, n_more):
    path = tmp_path / "bard"
    (tmp_path / "elsewhere").write_bytes(bytes(1 << 20))
    with pytest.raises(DiskFullError) as caught, new_directory(path) as work:
        (work / "inner").mkdir()
        (work / "inner" / "one").write_bytes(bytes(100_000))
        (work / "two").write_bytes(bytes(50_000))
        os.link(tmp_path / "elsewhere", work / "inner" / "linked")
        write(work)
    named, needed, _ = parts(caught.value)
    assert named == str(path / name)
    assert 150_000 + n_more <= needed < 170_000
    assert [entry.name for entry in tmp_path.iterdir()] == ["elsewhere"]


def test_a_file_elsewhere_is_not_charged_to_the_directory(tmp_path):
    with pytest.raises(DiskFullError) as caught, new_directory(tmp_path / "bard") as work:
        (work / "one").write_bytes(bytes(100_000))
        with room_for(tmp_path / "cache", 7):
            full()
    assert parts(caught.value)[:2] == (str(tmp_path / "cache"), 7)
    error = OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="cache") as found, new_directory(tmp_path / "bard"):
        raise error
    assert found.value is error


def test_lines_are_appended_with_the_same_words(tmp_path):
    link = tmp_path / "lines.jsonl"
    log, book = TrainingLog(link), Book(link, {"steps": 3})
    link.unlink()
    link.symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match=r"lines\.jsonl: expected room for at least 26 bytes"):
        log.write(10, {"loss": 2.5})
    with pytest.raises(DiskFullError, match=r"lines\.jsonl: expected room for at least \d+ bytes"):
        book.write({"kind": "base"})
    assert book.lines == []


# A small disk that is really full


def test_a_file_larger_than_the_disk(small_disk):
    disk = small_disk("size=64k")
    write_file(disk / "file", b"old")
    with pytest.raises(DiskFullError) as caught:
        write_file(disk / "file", bytes(100_000))
    assert parts(caught.value) == (str(disk / "file"), 100_000, 61_440)
    assert (disk / "file").read_bytes() == b"old"
    assert [entry.name for entry in disk.iterdir()] == ["file"]


def test_files_that_are_together_larger_than_the_disk(small_disk):
    disk = small_disk("size=64k")
    with pytest.raises(DiskFullError) as caught, new_directory(disk / "bard") as work:
        write_file(work / "one", bytes(50_000))
        write_file(work / "two", bytes(20_000))
    path, needed, free = parts(caught.value)
    assert path == str(disk / "bard" / "two")
    assert 70_000 <= needed < 80_000 and free == 65_536
    assert list(disk.iterdir()) == []


def test_a_disk_without_a_free_name(small_disk):
    disk = small_disk("size=64k,nr_inodes=2")
    (disk / "file").write_bytes(b"")
    for write in (lambda: write_file(disk / "new", b""), lambda: new_directory(disk / "new").__enter__()):
        with pytest.raises(DiskFullError, match=rf"^{disk}/new: expected room for one more file"):
            write()
    with (
        pytest.raises(DiskFullError, match=rf"^{disk}/\.lock: expected room for one more file"),
        locked_directory(disk, "nobody", "somebody"),
    ):
        pytest.fail("the block must not start")


def test_a_tokenizer_larger_than_the_disk(small_disk, llama):
    tokenizer = AutoTokenizer.from_pretrained(llama)
    disk = small_disk("size=8k")
    with pytest.raises(DiskFullError) as caught, new_directory(disk / "bard") as work:
        tokenizer.save_pretrained(work)
    assert parts(caught.value)[0] == str(disk / "bard")
    assert list(disk.iterdir()) == []


@pytest.fixture(scope="module")
def made(llama, tmp_path_factory):
    return random_adapter(llama, tmp_path_factory.mktemp("store"), rank=16)


WEIGHTS = {
    "lora": "adapter_model.safetensors",
    "merged": "model.safetensors",
    "onnx-adapter": "adapter.onnx_adapter",
    "genai": "adapter.onnx_adapter",
    "gguf": "adapter.gguf",
    "mlx": "adapters.safetensors",
}


@pytest.mark.parametrize(("name", "file"), WEIGHTS.items(), ids=WEIGHTS)
def test_an_export_larger_than_the_disk(small_disk, made, name, file):
    disk = small_disk("size=64k")
    with pytest.raises(ExportError) as caught:
        exporter_for(name, {}).emit(made.frozen, disk / "out", made.context)
    path, needed, free = parts(caught.value)
    assert path == str(disk / "out" / file)
    assert needed > 100_000 and free == 65_536
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(("n_kilobytes", "file"), [(124, "README.md"), (140, "qpa/probe.safetensors")])
def test_an_export_whose_last_files_find_no_room(small_disk, made, n_kilobytes, file):
    disk = small_disk(f"size={n_kilobytes}k")
    with pytest.raises(ExportError) as caught:
        exporter_for("lora", {}).emit(made.frozen, disk / "out", made.context)
    path, needed, free = parts(caught.value)
    assert path == str(disk / "out" / file)
    assert needed > free == n_kilobytes * 1024
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize("n_external", [0, 1 << 31])
def test_a_kept_graph_larger_than_its_disk(small_disk, monkeypatch, n_external):
    monkeypatch.setattr(graph_module, "EXTERNAL_DATA_BYTES", n_external)
    weight = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(np.ones(100_000, np.float32), name="w"))
    graph = onnx_ir.Graph([], [], nodes=[], initializers=[weight], opset_imports={"": 20})
    disk = small_disk("size=64k")
    with pytest.raises(DiskFullError) as caught:
        base_graph._keep(onnx_ir.Model(graph, ir_version=10), disk / "graphs" / "kept")
    path, needed, free = parts(caught.value)
    file = "model.onnx" if n_external else "model.onnx.data"
    assert (path, free) == (str(disk / "graphs" / "kept" / file), 65_536)
    assert needed >= 400_000
    assert list(disk.rglob("*")) == [disk / "graphs"]
