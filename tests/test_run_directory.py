import json
import re
from pathlib import Path

import pytest

from qpa.documents import (
    AdapterSpec,
    Attachment,
    Explanation,
    FrozenAdapter,
    LogicalCircuit,
    Measurement,
    NativeCircuit,
    TrainedGenerator,
    WeightLayout,
)
from qpa.errors import DocumentError, OptionError
from qpa.pipeline.stages import STAGES
from qpa.store.atomic_files import TEMPORARY_PREFIX
from qpa.store.run_directory import DirectoryStore, RunDirectory, check_free

GOLDEN = Path(__file__).parent / "golden"
KINDS = tuple(stage.document for stage in STAGES)
NAMES = ("llama", "aligned", "three-qubits", "generic", "twenty-steps", "exact", "llama", "llama")


FILES = [GOLDEN / f"{kind.kind}-1" / f"{name}.json" for kind, name in zip(KINDS, NAMES, strict=True)]


def stage_documents():
    """Return the golden run as today's qpa would have written it, each document with its parent."""
    documents, digests = [], {None: ()}
    for stage, file in zip(STAGES, FILES, strict=True):
        document = stage.document.from_json(file.read_bytes(), file.name)
        parent = {"parents": digests[stage.made_from]}
        provenance = document.provenance.model_copy(update=parent)
        documents.append(document.model_copy(update={"provenance": provenance}))
        digests[stage.document] = (documents[-1].digest,)
    return documents


DOCUMENTS = stage_documents()


@pytest.fixture
def run(tmp_path):
    with RunDirectory.create(tmp_path / "bard", force=False) as made:
        for document in DOCUMENTS:
            made.write(document)
    return RunDirectory.open(tmp_path / "bard")


def replanned(**changes):
    """Return the layout as another plan of the same spec would have made it."""
    provenance = DOCUMENTS[1].provenance.model_copy(update=changes)
    return DOCUMENTS[1].model_copy(update={"provenance": provenance})


def put_stale(run, document):
    """Put a document into a run without dropping the later stages."""
    (run.path / document.file_name()).write_bytes(document.to_json())


# Making a run


def test_a_run_holds_the_documents_that_were_written(run):
    assert run.read_through(KINDS[-1]) == tuple(DOCUMENTS)
    assert [run.read(kind) for kind in KINDS] == DOCUMENTS
    assert all(run.has(kind) for kind in KINDS)
    assert sorted(file.name for file in run.path.iterdir()) == sorted(kind.file_name() for kind in KINDS)


def test_an_empty_directory_becomes_a_run(tmp_path):
    (tmp_path / "bard").mkdir()
    with RunDirectory.create(tmp_path / "bard", force=False) as made:
        made.write(DOCUMENTS[0])
    assert RunDirectory.open(tmp_path / "bard").read(AdapterSpec) == DOCUMENTS[0]


def test_a_run_is_not_replaced_without_force(run):
    with (
        pytest.raises(OptionError, match=r"bard: .* an existing run; pass `force`"),
        RunDirectory.create(run.path, force=False),
    ):
        pytest.fail("the block must not start")
    assert run.read(KINDS[-1]) == DOCUMENTS[-1]


def check_not_replaced(run, match, *, force):
    """Check that a new run in the place of this one is refused, and that this one stays as it is."""
    with pytest.raises(OptionError, match=match), RunDirectory.create(run.path, force=force):
        pytest.fail("the block must not start")
    assert run.read(KINDS[-1]) == DOCUMENTS[-1]
    assert list(run.path.parent.iterdir()) == [run.path]


def test_a_run_that_a_killed_replacement_had_moved_is_there_again_and_not_replaced(run):
    moved = run.path.parent / f"{TEMPORARY_PREFIX}replaced-killed"
    moved.mkdir()
    run.path.rename(moved / run.path.name)
    check_not_replaced(run, r"bard: .* an existing run; pass `force`", force=False)


def test_force_replaces_a_run_and_keeps_nothing_of_it(run):
    with RunDirectory.create(run.path, force=True) as made:
        made.write(DOCUMENTS[0])
    assert [file.name for file in run.path.iterdir()] == ["adapter-spec.json"]


def test_force_does_not_replace_a_run_that_another_process_holds(run):
    with run.locked():
        check_not_replaced(run, "bard: expected a run that no command uses", force=True)


def test_a_run_is_held_until_it_is_replaced_and_the_new_one_is_free(run):
    with RunDirectory.create(run.path, force=True) as made:
        made.write(DOCUMENTS[0])
        with pytest.raises(OptionError, match="a run that no command uses"), run.locked():
            pytest.fail("the block must not start")
    with run.locked():
        assert run.read(AdapterSpec) == DOCUMENTS[0]


@pytest.mark.parametrize("force", [False, True])
def test_a_run_that_another_process_made_meanwhile_is_not_replaced(tmp_path, force):
    with (
        pytest.raises(OptionError, match=r"bard: .* an existing run"),
        RunDirectory.create(tmp_path / "bard", force=force),
        RunDirectory.create(tmp_path / "bard", force=force) as other,
    ):
        other.write(DOCUMENTS[0])
    assert RunDirectory.open(tmp_path / "bard").read(AdapterSpec) == DOCUMENTS[0]
    assert [entry.name for entry in tmp_path.iterdir()] == ["bard"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_run_is_never_replaced(tmp_path, force):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("more work")
    with pytest.raises(OptionError, match=r"thesis: .* a directory that is no qpa run"):
        check_free(tmp_path / "thesis", force=force)
    with pytest.raises(OptionError, match="file: expected a new directory, found a file"):
        check_free(tmp_path / "file", force=force)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


@pytest.mark.parametrize("error", [OptionError("rank", "8", "9"), KeyboardInterrupt()])
def test_a_block_that_fails_leaves_the_old_run_as_it_was(run, error):
    before = {file.name: file.read_bytes() for file in run.path.iterdir()}
    with pytest.raises(type(error)), RunDirectory.create(run.path, force=True) as made:
        made.write(DOCUMENTS[0])
        raise error
    assert {file.name: file.read_bytes() for file in run.path.iterdir()} == before
    assert [entry.name for entry in run.path.parent.iterdir()] == ["bard"]


def test_a_block_that_fails_leaves_no_new_run(tmp_path):
    with pytest.raises(ZeroDivisionError), RunDirectory.create(tmp_path / "bard", force=False) as made:
        made.write(DOCUMENTS[0])
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


# Reading a run


def test_a_run_of_the_first_schemas_is_read(tmp_path):
    """Circuits were not measured again in those days, and training was made from the native circuit."""
    kinds = [kind for kind in KINDS if kind not in (Measurement, Explanation)]
    for kind, file in zip(KINDS, FILES, strict=True):
        if kind in kinds:
            (tmp_path / kind.file_name()).write_bytes(file.read_bytes())
    run = RunDirectory.open(tmp_path)
    documents = run.read_through(FrozenAdapter)
    assert [type(document) for document in documents] == kinds
    assert run.read(WeightLayout).features.kind == "circuit"


def test_opening_what_is_no_run_says_how_to_make_one(tmp_path):
    with pytest.raises(DocumentError, match=r"no such directory; make one: qpa plan `out` .*/bard"):
        RunDirectory.open(tmp_path / "bard")
    with pytest.raises(DocumentError, match=r"found no adapter-spec\.json in it"):
        RunDirectory.open(tmp_path)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_missing_stage_names_the_command_that_makes_it(run, kind):
    (run.path / kind.file_name()).unlink()
    trained = (TrainedGenerator, Measurement, FrozenAdapter)
    command = "qpa explain" if kind is Explanation else "qpa train" if kind in trained else "qpa plan"
    with pytest.raises(DocumentError, match=f"{kind.file_name()}: .* found nothing; run {command} first"):
        run.read(kind)
    assert not run.has(kind)


@pytest.mark.parametrize("index", range(1, len(KINDS)))
def test_a_stage_whose_parent_changed_is_stale(run, index):
    parent = DOCUMENTS[KINDS.index(STAGES[index].made_from)]
    changed = parent.model_copy(update={"provenance": parent.provenance.model_copy(update={"seed": 8})})
    put_stale(run, changed)
    stale = f"{KINDS[index].file_name()}: expected a document made from this {parent.file_name()}"
    with pytest.raises(DocumentError, match=re.escape(stale)) as caught:
        run.read(KINDS[index])
    assert "stale: run the passes again" in caught.value.advice


def test_a_stage_is_stale_when_any_stage_before_it_is(run):
    put_stale(run, replanned(parents=("sha256:" + "0" * 64,)))
    with pytest.raises(DocumentError, match=r"weight-layout\.json: .* made from this adapter-spec\.json"):
        run.read(FrozenAdapter)
    assert run.read(AdapterSpec) == DOCUMENTS[0]


def test_an_edited_stage_names_its_file(run):
    file = run.path / "weight-layout.json"
    file.write_bytes(file.read_bytes().replace(b'"n_layers": 3', b'"n_layers": 4'))
    with pytest.raises(DocumentError, match=r"bard/weight-layout\.json: .* edited or damaged"):
        run.read(LogicalCircuit)


def test_a_stage_of_another_kind_is_refused(run):
    (run.path / "weight-layout.json").write_bytes(DOCUMENTS[0].to_json())
    with pytest.raises(DocumentError, match=r"weight-layout\.json: expected schema qpa\.weight-layout/1"):
        run.read(WeightLayout)


@pytest.mark.parametrize("index", range(len(KINDS)))
def test_writing_a_stage_drops_what_is_made_from_it(run, index):
    run.write(DOCUMENTS[index])
    # The native circuit and what is trained are made from the logical circuit, and not from each other.
    kept = KINDS if KINDS[index] is NativeCircuit else KINDS[: index + 1]
    assert [run.has(kind) for kind in KINDS] == [kind in kept for kind in KINDS]


def test_a_native_circuit_that_is_missing_or_stale_keeps_nobody_from_what_was_trained(run):
    native = DOCUMENTS[KINDS.index(NativeCircuit)]
    provenance = native.provenance.model_copy(update={"parents": ("sha256:" + "0" * 64,)})
    put_stale(run, native.model_copy(update={"provenance": provenance}))
    others = tuple(document for document in DOCUMENTS if document != native)
    assert run.read_through(KINDS[-1]) == others
    (run.path / NativeCircuit.file_name()).unlink()
    assert run.read_through(KINDS[-1]) == others


# Files beside the documents


@pytest.fixture
def store(tmp_path):
    return DirectoryStore(tmp_path)


def test_a_stored_file_is_named_by_its_digest(store):
    attachment = store.put("{sha256}.safetensors", b"arrays")
    assert attachment.file == f"{attachment.sha256}.safetensors"
    assert attachment.n_bytes == 6
    assert store.get(attachment).read_bytes() == b"arrays"
    assert store.describe(store.get(attachment)) == attachment


def test_a_described_file_is_named_relative_to_the_store(store):
    store.put("qpa/probe.safetensors", b"probe")
    attachment = store.describe(store.path / "qpa" / "probe.safetensors")
    assert attachment.file == "qpa/probe.safetensors"
    assert store.get(attachment) == store.path / "qpa" / "probe.safetensors"


def test_a_truncated_file_is_refused(store):
    attachment = store.put("file", b"all of it")
    (store.path / "file").write_bytes(b"all of")
    with pytest.raises(DocumentError, match=r"/file: expected 9 bytes, found 6 bytes; run the pass again"):
        store.get(attachment)


def test_a_changed_file_is_refused(store):
    attachment = store.put("file", b"all of it")
    (store.path / "file").write_bytes(b"all of IT")
    with pytest.raises(DocumentError, match=f"/file: expected SHA-256 {attachment.sha256}, found another"):
        store.get(attachment)


@pytest.mark.parametrize("leftover", ["nothing", "a directory"])
def test_a_missing_file_is_refused(store, leftover):
    attachment = store.put("file", b"all of it")
    (store.path / "file").unlink()
    if leftover == "a directory":
        (store.path / "file").mkdir()
    with pytest.raises(DocumentError, match=r"/file: expected a file named by a document, found nothing"):
        store.get(attachment)


def test_an_empty_file_is_a_file(store):
    empty = store.put("empty", b"")
    assert empty == Attachment(
        file="empty", sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", n_bytes=0
    )
    assert store.get(empty).read_bytes() == b""


def with_arrays(store, document, content, **changes):
    """Return a document whose arrays are a new file of the store, named by its digest."""
    arrays = store.put("{sha256}.safetensors", content)
    return document.model_copy(update={"arrays": arrays, **changes})


TRAINED, FROZEN = DOCUMENTS[KINDS.index(TrainedGenerator)], DOCUMENTS[KINDS.index(FrozenAdapter)]


def arrays_in(path):
    return {file.read_bytes() for file in path.glob("*.safetensors")}


def test_arrays_are_removed_with_the_last_document_that_names_them(run):
    run.write(with_arrays(run.files, TRAINED, b"trained"))
    run.write(with_arrays(run.files, FROZEN, b"frozen"))
    assert arrays_in(run.path) == {b"trained", b"frozen"}
    run.write(with_arrays(run.files, TRAINED, b"trained again"))
    assert arrays_in(run.path) == {b"trained again"}
    run.write(with_arrays(run.files, FROZEN, b"trained again"))
    run.write(with_arrays(run.files, FROZEN, b"frozen again"))
    assert arrays_in(run.path) == {b"trained again", b"frozen again"}
    run.write(DOCUMENTS[0])
    assert arrays_in(run.path) == set()


def test_files_that_are_no_arrays_of_this_run_stay(run, tmp_path):
    old = with_arrays(run.files, FROZEN, b"a result that the user keeps")
    (run.path / "best.json").write_bytes(old.to_json())
    (tmp_path / "link").write_bytes(b"linked")
    (run.path / f"{'0' * 64}.safetensors").symlink_to(tmp_path / "link")
    (run.path / f"{'1' * 64}.safetensors").mkdir()
    others = [f"{'2' * 64}.npz", f"{'3' * 63}.safetensors", "mine.safetensors"]
    others += [f"export/{'4' * 64}.safetensors", f"checkpoints/step-00000001/{'5' * 64}.safetensors"]
    for name in others:
        run.files.put(name, b"another's")
    run.files.drop_from(Explanation)
    before = sorted(run.path.rglob("*"))
    run.write(FROZEN)
    assert sorted(run.path.rglob("*")) == before


def test_where_a_document_cannot_be_read_no_arrays_are_removed(run, monkeypatch):
    run.write(with_arrays(run.files, TRAINED, b"trained"))

    def fail(path):
        raise PermissionError(path)

    monkeypatch.setattr(Path, "read_bytes", fail)
    run.write(TRAINED)
    monkeypatch.undo()
    assert arrays_in(run.path) == {b"trained"}


@pytest.mark.parametrize("n_removed", range(4))
def test_a_kill_at_any_removal_leaves_every_document_its_arrays(run, monkeypatch, n_removed):
    class Killed(BaseException):
        """Like a signal, it is caught by nobody."""

    run.write(with_arrays(run.files, TRAINED, b"trained"))
    run.write(DOCUMENTS[KINDS.index(Measurement)])
    run.write(with_arrays(run.files, FROZEN, b"frozen"))
    again = with_arrays(run.files, TRAINED, b"trained again")
    unlink, removed = Path.unlink, []

    def unlink_some(path, missing_ok=False):
        if len(removed) == n_removed:
            raise Killed
        removed.append(path)
        unlink(path, missing_ok=missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink_some)
    with pytest.raises(Killed):
        run.write(again)
    monkeypatch.undo()
    for kind in (TrainedGenerator, FrozenAdapter):
        if run.has(kind):
            text = (run.path / kind.file_name()).read_bytes()
            run.files.get(kind.from_json(text, kind.kind).arrays)
    run.write(again)
    assert arrays_in(run.path) == {b"trained again"}


def test_documents_are_readable_json(run):
    content = json.loads((run.path / "adapter-spec.json").read_bytes())
    assert content["schema"] == f"qpa.adapter-spec/{AdapterSpec.schema_version()}"
