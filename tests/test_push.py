"""qpa push uploads what is verified, and nothing else; the Hub is played by its client's own class."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qpa.documents import FrozenAdapter
from qpa.exporters.formats.lora import ExportLora
from qpa.pipeline.pass_protocol import PassContext
from tests.command_line import Cli
from tests.test_train_generator import plan, train


@pytest.fixture(scope="module")
def exported(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    run = plan(llama, folder / "run")
    train(run, text_file)
    documents = run.read_through(FrozenAdapter)
    ExportLora().emit(documents[-1], folder / "adapter", PassContext(0, run.files, documents))
    return folder / "adapter"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Return what was asked of the Hub, instead of asking it."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def create_repo(self: Any, repo_id: str, **options: Any) -> None:
        asked.append(("create_repo", {"repo_id": repo_id, **options}))

    def upload_folder(self: Any, **options: Any) -> SimpleNamespace:
        asked.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://hub/me/bard/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload_folder)
    return asked


def test_an_export_that_is_not_verified_stays_here(
    cli: Cli, exported: Path, hub: list[tuple[str, dict[str, Any]]]
) -> None:
    line = cli.refuses("push", exported, "--repo", "me/bard")
    assert line.endswith(
        f"an export that is verified, found one that is not; verify it first: qpa verify {exported}\n"
    )
    assert not hub


@pytest.mark.usefixtures("in_process")
def test_a_verified_export_is_uploaded_file_by_file(
    cli: Cli, exported: Path, hub: list[tuple[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    cli("verify", exported)
    code, out, err = cli("push", exported, "--repo", "me/bard", "--json")
    assert json.loads(out)["commit"] == "https://hub/me/bard/commit/1" and code == 0
    assert "hf_secret" not in out + err
    (_, made), (_, sent) = hub
    assert made == {"repo_id": "me/bard", "private": True, "exist_ok": True}
    assert (sent["repo_id"], sent["folder_path"]) == ("me/bard", exported)
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} < set(sent["allow_patterns"])
    assert {"qpa/manifest.json", "qpa/verification.json"} < set(sent["allow_patterns"])
    # What changed since, or does not belong there, is found before anything is sent.
    del hub[:]
    (exported / "diary.txt").write_text("dear diary")
    assert "diary.txt" in cli.refuses("push", exported, "--repo", "me/bard")
    (exported / "diary.txt").unlink()
    config = exported / "adapter_config.json"
    whole = config.read_bytes()
    config.write_bytes(whole.replace(b'"r"', b'"q"'))
    assert "adapter_config.json" in cli.refuses("push", exported, "--repo", "me/bard")
    config.write_bytes(whole)
    assert not hub


@pytest.mark.usefixtures("in_process")
def test_what_the_hub_refuses_is_one_line(cli: Cli, exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli("verify", exported)
    line = cli.refuses("push", exported, "--repo", "me/not/this")
    assert "--repo: expected a name such as user/adapter, found me/not/this" in line
    line = cli.refuses("push", exported, "--repo", "me/bard")  # the tests are offline
    assert "me/bard: expected a repository that can be written to, found" in line
    assert line.count("\n") == 1
