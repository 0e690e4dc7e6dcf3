"""What `qpa verify` found is kept in the export: it breaks no rule, goes with the export, and is shown."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest

from qpa.documents import MANIFEST_PATH, read_manifest
from qpa.documents.verification import VERIFICATION_PATH, read_verification
from qpa.exporters.contracts.export import check_contract
from qpa.exporters.formats.lora import ExportLora
from qpa.exporters.formats.merged import ExportMerged
from qpa.store import run_directory
from qpa.store.atomic_files import TEMPORARY_PREFIX
from tests.command_line import Cli
from tests.random_adapter import RandomAdapter, random_adapter
from tests.test_documents import seal

# peft asks transformers by a name that transformers has renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.usefixtures("in_process"),
]


@pytest.fixture(scope="module")
def made(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RandomAdapter:
    """Return a random adapter on a tiny Llama."""
    return random_adapter(llama, tmp_path_factory.mktemp("store"))


@pytest.fixture
def out(made: RandomAdapter, tmp_path: Path) -> Path:
    """Return a fresh export of `made`."""
    ExportLora().emit(made.frozen, tmp_path / "out", made.context)
    return tmp_path / "out"


def verified(cli: Cli, out: Path) -> Path:
    """Verify an export in PEFT; return the file that is kept."""
    code, words, _ = cli("verify", out, "--engine", "peft")
    assert code == 0 and f"wrote {out / VERIFICATION_PATH}" in words.replace("\n", "")
    return out / VERIFICATION_PATH


def test_what_a_killed_verification_left_is_in_nobodys_way_and_goes_with_the_next(cli, out, made):
    left = out / "qpa" / f"{TEMPORARY_PREFIX}killed"
    left.write_bytes(b"{")
    left.chmod(0o600)
    verified(cli, out)
    assert not left.exists()
    left.write_bytes(b"{")
    ExportLora().emit(made.frozen, out, made.context, force=True)
    assert check_contract(out) == () and not left.exists()


def words_of(text: str) -> str:
    return " ".join(text.split())


def test_a_verification_is_kept_and_breaks_no_rule(cli, out):
    before = (out / MANIFEST_PATH).read_bytes()
    kept = verified(cli, out)
    document = read_verification(out)
    assert (kept.stat().st_mode & 0o777, (out / MANIFEST_PATH).read_bytes()) == (0o644, before)
    assert check_contract(out) == () and document.is_of(out)
    (check,) = document.engines
    assert check.version and check.max_logit_difference <= check.bound < check.max_base_difference
    assert str(out) not in kept.read_text()
    verified(cli, out)


@pytest.mark.parametrize("export", [ExportLora, ExportMerged])
def test_inspect_shows_what_was_found(cli, made, tmp_path, export):
    out = tmp_path / "out"
    export().emit(made.frozen, out, made.context)
    assert "not yet: qpa verify" in cli("inspect", out)[1]
    assert json.loads(cli("inspect", out, "--json")[1])["verification"] is None
    engine = "transformers"
    content = json.loads(cli("verify", out, "--engine", engine, "--json")[1])
    assert content["kept"] is True
    shown = words_of(cli("inspect", out)[1])
    assert f"verified in {engine} 5." in shown and "greedy tokens equal" in shown
    assert f"{content['engines'][0]['max_logit_difference']:.1e}" in shown
    found = json.loads(cli("inspect", out, "--json")[1])
    assert found["findings"] == [] and found["verification"]["stale"] is False
    assert found["verification"]["engines"] == content["engines"]


def test_what_is_equal_within_rounding_alone_is_called_so_and_its_bound_is_shown(cli, made, tmp_path):
    out = tmp_path / "out"
    ExportLora(dtype="bfloat16").emit(made.frozen, out, made.context)
    shown = words_of(cli("verify", out, "--engine", "peft")[1])
    content = json.loads(cli("verify", out, "--engine", "peft", "--json")[1])
    bound = f"{content['engines'][0]['bound']:.1e}"
    assert "equal to the trained model within bfloat16 rounding" in shown and bound in shown
    assert content["dtype"] == "bfloat16"
    assert f"at most {bound}" in words_of(cli("inspect", out)[1])
    assert "a difference of" in cli.refuses("verify", out, "--engine", "peft", "--tolerance", "1e-9")
    shown = words_of(cli("verify", out, "--engine", "peft", "--tolerance", "0.2")[1])
    assert "within a tolerance of 0.2" in shown


def test_a_verification_of_another_export_is_stale(cli, made, out, tmp_path):
    kept = verified(cli, out)
    ExportLora(dtype="bfloat16").emit(made.frozen, tmp_path / "other", made.context)
    shutil.copy(kept, tmp_path / "other" / VERIFICATION_PATH)
    assert not read_verification(tmp_path / "other").is_of(tmp_path / "other")
    assert "stale, since it is that of another export" in words_of(cli("inspect", tmp_path / "other")[1])
    assert json.loads(cli("inspect", tmp_path / "other", "--json")[1])["verification"]["stale"] is True
    verified(cli, tmp_path / "other")
    assert read_verification(tmp_path / "other").is_of(tmp_path / "other")


def test_the_manifest_of_an_older_schema_keeps_its_verification(cli, out):
    content = json.loads((out / MANIFEST_PATH).read_bytes())
    n_upgrades = int(content["schema"].rpartition("/")[2])
    verified(cli, out)
    kept = json.loads((out / VERIFICATION_PATH).read_bytes())
    manifest = {key: value for key, value in content.items() if key != "method"}
    (manifest["provenance"]["parent"],) = manifest["provenance"].pop("parents")
    older = json.loads(seal(manifest | {"schema": "qpa.manifest/2"}))
    assert n_upgrades > 2
    (out / MANIFEST_PATH).write_text(json.dumps(older))
    for parent in (read_manifest(out).digest, older["digest"]):
        kept["provenance"]["parents"] = [parent]
        (out / VERIFICATION_PATH).write_bytes(seal(kept))
        assert read_verification(out).is_of(out)


def test_a_new_export_in_its_place_has_none(cli, made, out):
    kept = verified(cli, out)
    ExportLora().emit(made.frozen, out, made.context, force=True)
    assert not kept.exists()


@pytest.mark.parametrize("damage", [lambda text: text[:-20], lambda text: text.replace(b"peft", b"tarot")])
def test_a_damaged_verification_is_a_finding(cli, out, damage):
    kept = verified(cli, out)
    kept.write_bytes(damage(kept.read_bytes()))
    (finding,) = check_contract(out)
    assert (finding.rule, finding.subject) == ("L20", VERIFICATION_PATH)
    code, words, err = cli("inspect", out)
    assert (code, err) == (0, "") and "L20" in words


def test_where_it_cannot_be_kept_one_line_says_so(cli, out, monkeypatch):
    def fail(path, content):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(run_directory, "write_file", fail)
    code, words, err = cli("verify", out, "--engine", "peft")
    assert (code, err) == (0, "")
    assert words.splitlines()[-1] == f"{out / VERIFICATION_PATH} could not be written: Read-only file system"
    assert json.loads(cli("verify", out, "--engine", "peft", "--json")[1])["kept"] is False
    assert not (out / VERIFICATION_PATH).exists()
