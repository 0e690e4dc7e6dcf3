"""What holds for the export of every format: options, a full disk, and a base model that is another."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qpa.documents import MANIFEST_PATH
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import ENGINES
from qpa.errors import ExportError, ModelError, OptionError
from qpa.exporters.contracts.export import check_contract
from qpa.exporters.directory import PROBE_FILE
from qpa.exporters.registry import exporter_for
from qpa.store.atomic_files import TEMPORARY_PREFIX
from tests.random_adapter import RandomAdapter, random_adapter
from tests.tiny_models import tiny_llama

# peft asks transformers by a name that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

READS_BASE = [name for name in FORMATS if FORMATS[name].reads_base_model]


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a random adapter whose tensors are larger than the limit of `a_full_disk`."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"), rank=16)


@contextmanager
def a_full_disk(n_bytes: int) -> Iterator[None]:
    """Let no file of this process become longer than this, as where the disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", ["lora", "merged", "onnx-adapter", "gguf", "mlx"])
def test_a_full_disk_is_one_line_and_leaves_nothing(made, tmp_path, name):
    exporter = exporter_for(name, {})
    with (
        a_full_disk(20_000),
        pytest.raises(ExportError, match="a directory that can be written, found") as error,
    ):
        exporter.emit(made.frozen, tmp_path / "out", made.context)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["bard", "adapters/bard"])
@pytest.mark.parametrize(
    ("failed", "is_of_output"),
    [
        ("models/config.json", False),
        ("adapters/config.json", False),
        ("bard.json", False),
        ("{out}", True),
        (f"{{parent}}/{TEMPORARY_PREFIX}1/config.json", True),
        ("{parent}", True),
    ],
)
def test_what_cannot_be_read_is_not_told_of_the_output(
    made, tmp_path, monkeypatch, out, failed, is_of_output
):
    monkeypatch.chdir(tmp_path)
    failed = failed.format(out=out, parent=Path(out).parent)

    def fail(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", failed)

    exporter = exporter_for("lora", {})
    monkeypatch.setattr(type(exporter), "write", fail)
    with pytest.raises(ExportError) as error:
        exporter.emit(made.frozen, Path(out), made.context)
    expected = (
        (out, "a directory that can be written") if is_of_output else (failed, "a file that can be read")
    )
    assert (error.value.subject, error.value.expected) == expected
    assert error.value.found == "Permission denied"


@pytest.mark.parametrize("name", ["lora", "merged", "gguf", "mlx"])
def test_the_probe_and_the_manifest_are_in_every_export(made, tmp_path, name):
    manifest = exporter_for(name, {}).emit(made.frozen, tmp_path / "out", made.context)
    assert manifest.format == name and manifest.probe == PROBE_FILE
    assert (tmp_path / "out" / MANIFEST_PATH).is_file()
    assert check_contract(tmp_path / "out") == ()
    (tmp_path / "out" / PROBE_FILE).unlink()
    (finding,) = check_contract(tmp_path / "out")
    assert (finding.rule, finding.subject) == ("L20", PROBE_FILE)


@pytest.mark.parametrize("name", READS_BASE)
def test_a_base_with_another_config_is_refused(made, gpt2, tmp_path, name):
    exporter = exporter_for(name, {"model": str(gpt2)})
    with pytest.raises(ModelError, match="the config the adapter was planned for"):
        exporter.emit(made.frozen, tmp_path / "out", made.context)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", READS_BASE)
def test_a_base_that_is_gone_is_refused(tmp_path, name):
    base = tiny_llama(tmp_path / "base")
    made = random_adapter(base, tmp_path / "store")
    base.rename(tmp_path / "moved")
    with pytest.raises(ModelError, match="no such directory"):
        exporter_for(name, {}).emit(made.frozen, tmp_path / "out", made.context)
    assert not (tmp_path / "out").exists()


def test_every_format_has_its_engines_and_every_engine_its_file():
    engines = {name: FORMATS[name].engines for name in FORMATS}
    assert [name for name in FORMATS if not engines[name]] == [
        name for name in FORMATS if FORMATS[name].is_file
    ]
    assert set().union(*engines.values()) == {*ENGINES}
    for name in ENGINES:
        assert ENGINES[name].name == name
        assert "def open_engine(request: Request)" in Path(ENGINES[name].file).read_text()


def test_what_a_format_says_of_itself_needs_no_heavy_package():
    code = (
        "import json, sys\n"
        "from qpa.documents.manifest import FORMATS\n"
        "from qpa.documents.verification import ENGINES\n"
        "known = [FORMATS[name].name for name in FORMATS] + [ENGINES[name].name for name in ENGINES]\n"
        "print(json.dumps([known, sorted(sys.modules)]))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    known, modules = json.loads(printed)
    assert known == [*FORMATS, *ENGINES]
    assert not {"torch", "transformers", "peft", "onnx_ir", "onnxruntime", "qiskit", "gguf"} & {*modules}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("tarot", {}, "format: expected lora, peft, merged, .* found tarot"),
        ("gguf", {"rank_pad": 16}, "rank_pad: expected no such option with `format` gguf, found 16"),
        ("merged", {"allow_tied_head": True}, "allow_tied_head: expected no such option"),
        ("lora", {"model": "x"}, "model: expected no such option with `format` lora"),
    ],
)
def test_an_option_of_another_format_is_refused(name, options, words):
    with pytest.raises(OptionError, match=f"^{words}"):
        exporter_for(name, options)


def test_a_lora_directory_cannot_call_itself_something_else(made, tmp_path):
    manifest = exporter_for("lora", {}).emit(made.frozen, tmp_path / "out", made.context)
    forged = manifest.model_copy(update={"format": "merged"})
    (tmp_path / "out" / MANIFEST_PATH).write_bytes(forged.to_json())
    findings = check_contract(tmp_path / "out")
    assert [(finding.rule, finding.subject) for finding in findings] == [
        ("L21", "config.json"),
        ("L21", "adapter_model.safetensors"),
    ]


def test_what_appears_while_an_export_is_made_is_not_replaced(made, tmp_path, monkeypatch):
    out, exporter = tmp_path / "out", exporter_for("lora", {})
    write = type(exporter).write

    def slow(self, frozen, context, directory):
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        return write(self, frozen, context, directory)

    monkeypatch.setattr(type(exporter), "write", slow)
    with pytest.raises(ExportError, match="a directory that is no qpa export"):
        exporter.emit(made.frozen, out, made.context)
    assert (out / "notes.txt").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [out]


def test_a_huge_sparse_tensor_is_a_finding_and_takes_no_memory(made, tmp_path):
    exporter_for("lora", {}).emit(made.frozen, tmp_path / "out", made.context)
    (tmp_path / "out" / MANIFEST_PATH).unlink()
    n_numbers = 1 << 28
    header = {"x": {"dtype": "F32", "shape": [n_numbers], "data_offsets": [0, 4 * n_numbers]}}
    content = json.dumps(header).encode()
    with (tmp_path / "out" / "adapter_model.safetensors").open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        stream.truncate(8 + len(content) + 4 * n_numbers)
    tracemalloc.start()
    findings = check_contract(tmp_path / "out")
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "L14" in {finding.rule for finding in findings}
    assert peak_bytes < 64 << 20
