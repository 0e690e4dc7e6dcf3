import json
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from qpa.documents import (
    MAX_QUBITS,
    AdapterSpec,
    AdapterTensor,
    Ansatz,
    Attachment,
    Bank,
    BaseModelReference,
    BasisReference,
    BasisTensor,
    Checkpoint,
    ChosenBank,
    Contribution,
    DataSummary,
    DirectionShare,
    Document,
    EngineCheck,
    ExplainedPart,
    Explanation,
    FrozenAdapter,
    GateCount,
    HubDataset,
    Input,
    LeftOut,
    LogicalCircuit,
    Manifest,
    MeasuredContext,
    Measurement,
    NativeCircuit,
    Package,
    PassOption,
    PlaceShare,
    Provenance,
    ResolvedConfiguration,
    Score,
    Selection,
    SharedBasis,
    SplitSummary,
    Strategy,
    TrainedContext,
    TrainedFrom,
    TrainedGenerator,
    TrainingResult,
    TriedCircuit,
    Verification,
)
from qpa.documents.base import digest_of
from qpa.errors import DocumentError
from qpa.passes.plan_layout import PlanLayout
from qpa.pipeline.pass_protocol import PassContext
from qpa.pipeline.stages import STAGES
from qpa.store.run_directory import DirectoryStore

FEATURES = ("circuit", "classical", "random", "bits")
GOLDEN = Path(__file__).parent / "golden"
GOLDEN_FILES = sorted(GOLDEN.rglob("*.json"))
STAGE_KINDS = tuple(stage.document for stage in STAGES)
OTHERS = (SharedBasis, Manifest, Checkpoint, Verification, Selection, ResolvedConfiguration)
KINDS = {kind.kind: kind for kind in (*STAGE_KINDS, *OTHERS)}
NOWHERE = PassContext(seed=0, files=DirectoryStore(Path("nowhere")))


def golden_id(file):
    return f"{file.parent.name}/{file.stem}"


def kind_of(file):
    return KINDS[file.parent.name.rpartition("-")[0]]


def seal(content):
    """Write a JSON object as a document file with the digest its content has."""
    content = {key: value for key, value in content.items() if key != "digest"}
    return json.dumps(content | {"digest": digest_of(content)}).encode()


def golden(name):
    file = GOLDEN / f"{name}.json"
    return kind_of(file), json.loads(file.read_bytes())


def is_newest(file):
    return int(file.parent.name.rpartition("-")[2]) == kind_of(file).schema_version()


def read(file):
    return kind_of(file).from_json(file.read_bytes(), file.name)


# Golden documents


@pytest.mark.parametrize("file", [file for file in GOLDEN_FILES if is_newest(file)], ids=golden_id)
def test_a_golden_document_is_read_and_written_to_the_same_bytes(file):
    document = read(file)
    assert document.to_json() == file.read_bytes()
    assert document.digest == json.loads(file.read_bytes())["digest"]


@pytest.mark.parametrize("file", [file for file in GOLDEN_FILES if not is_newest(file)], ids=golden_id)
def test_a_golden_document_of_an_older_schema_becomes_the_one_that_is_written_today(file):
    document, kind = read(file), kind_of(file)
    again = kind.from_json(document.to_json(), file.name)
    assert again == document
    assert json.loads(document.to_json())["schema"] == f"qpa.{kind.kind}/{kind.schema_version()}"
    newest = read(GOLDEN / f"{kind.kind}-{kind.schema_version()}" / file.name)
    # The pass has more options now; all else that an old run recorded is the same.
    assert document == newest.model_copy(update={"provenance": document.provenance})
    assert document.provenance.parent == newest.provenance.parent


def test_every_kind_of_document_has_a_golden_one_of_every_schema():
    expected = {
        f"{kind.kind}-{version}" for kind in KINDS.values() for version in range(1, kind.schema_version() + 1)
    }
    assert {file.parent.name for file in GOLDEN_FILES} == expected


def test_the_golden_llama_run_is_one_chain_of_parents():
    names = (
        "adapter-spec-1/llama weight-layout-1/aligned logical-circuit-1/three-qubits "
        "native-circuit-1/generic trained-generator-1/twenty-steps frozen-adapter-1/llama manifest-1/lora"
    )
    contents = [golden(name)[1] for name in names.split()]
    assert [content["provenance"]["parent"] for content in contents] == [
        None,
        *(content["digest"] for content in contents[:-1]),
    ]
    layouts = [golden(f"weight-layout-2/{name}")[1] for name in ("spectral", "aligned", "paper")]
    assert {layout["provenance"]["parent"] for layout in layouts} == {contents[0]["digest"]}


# Valid documents, drawn

TEXT = st.text(max_size=12)
NAME = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)
FLOAT = st.floats(allow_nan=False, allow_infinity=False)
COUNT = st.integers(0, 2**70)
POSITIVE = st.integers(1, 2**40)
DIGEST = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
FILE = st.from_regex(r"[a-z0-9]{1,8}(/[a-z0-9]{1,8})?(\.safetensors)?", fullmatch=True)
ATTACHMENT = st.builds(Attachment, file=FILE, sha256=DIGEST.map(lambda digest: digest[7:]), n_bytes=COUNT)
OPTION_VALUE = st.one_of(
    st.booleans(), st.integers(), FLOAT, TEXT, st.none(), st.lists(TEXT, max_size=3).map(tuple)
)
PROVENANCE = st.builds(
    Provenance,
    pass_name=NAME,
    options=st.lists(st.builds(PassOption, name=NAME, value=OPTION_VALUE), max_size=4).map(tuple),
    seed=st.integers(),
    qpa_version=TEXT,
    parents=st.lists(DIGEST, max_size=3).map(tuple),
)
BASE = st.builds(
    BaseModelReference,
    name_or_path=TEXT,
    local=st.booleans(),
    revision=st.none() | TEXT,
    config_digest=DIGEST,
    model_type=TEXT,
    architecture=TEXT,
    head=st.none() | TEXT,
    ties_lm_head=st.booleans(),
    trust_remote_code=st.booleans(),
)
LEFT_OUT = st.builds(LeftOut, layers=TEXT, n_layers=POSITIVE, reason=TEXT)
RESULT = st.builds(
    TrainingResult,
    n_steps=COUNT,
    frozen_step=COUNT,
    objective=NAME,
    scores=st.lists(st.builds(Score, name=NAME, base=FLOAT, adapted=FLOAT), max_size=2).map(tuple),
    quantization=st.none() | NAME,
    n_train_tokens=POSITIVE,
    n_eval_tokens=POSITIVE,
    base_loss=FLOAT,
    eval_loss=FLOAT,
    data_digest=DIGEST,
)


def tensor_pair(module, rank, n_in, n_out):
    module_type = module.rpartition(".")[2]
    return (
        AdapterTensor(
            module=module,
            module_type=module_type,
            role="lora_A",
            shape=(rank, n_in),
            initial="kaiming_uniform",
        ),
        AdapterTensor(
            module=module, module_type=module_type, role="lora_B", shape=(n_out, rank), initial="zeros"
        ),
    )


@st.composite
def adapter_specs(draw, min_rank=1):
    rank = draw(st.integers(min_rank, 4))
    side = st.integers(rank, 9)
    modules = draw(st.lists(st.sampled_from(["0.q", "1.q", "0.up", "1.up", "head"]), min_size=1, unique=True))
    return AdapterSpec(
        provenance=draw(PROVENANCE),
        base=draw(BASE),
        method="lora",
        rank=rank,
        alpha=draw(FLOAT),
        target_modules=tuple(modules),
        target_parameters=tuple(draw(st.lists(NAME, max_size=2))),
        left_out=tuple(draw(st.lists(LEFT_OUT, max_size=2))),
        fan_in_fan_out=draw(st.booleans()),
        tensors=tuple(t for name in modules for t in tensor_pair(name, rank, draw(side), draw(side))),
        seed=draw(st.integers()),
        parent=None,
        basis=draw(
            st.none()
            | st.builds(BasisReference, directory=TEXT, digest=TEXT, base=TEXT, revision=st.none() | TEXT)
        ),
    )


@st.composite
def weight_layouts(draw):
    plan = draw(
        st.one_of(
            st.builds(PlanLayout, layers=st.integers(1, 3), features=st.sampled_from(FEATURES)),
            st.builds(
                PlanLayout,
                generator=st.just("aligned"),
                circuits=st.integers(1, 3),
                layers=st.integers(1, 3),
                features=st.sampled_from(FEATURES),
            ),
            st.builds(PlanLayout, generator=st.just("paper"), chunk_size=st.integers(1, 60)),
            st.builds(
                PlanLayout,
                generator=st.just("state"),
                layers=st.integers(1, 3),
                features=st.sampled_from(("circuit", "random", "constant", "log-linear", "own")),
            ),
            st.just(PlanLayout(generator="direct")),
            st.builds(
                PlanLayout,
                generator=st.sampled_from(("state", "spectral", "aligned")),
                layers=st.integers(1, 3),
                contexts=st.lists(NAME, min_size=2, max_size=4, unique=True).map(tuple),
                context_kind=st.sampled_from(("task", "prompt")),
                context_size=st.integers(1, 3),
            ),
        )
    )
    return plan.run(draw(adapter_specs(min_rank=2)), NOWHERE)


@st.composite
def native_circuits(draw):
    n_qubits = draw(st.integers(1, 6))
    gates = draw(st.lists(st.builds(GateCount, gate=NAME, count=st.integers(0, 99)), max_size=3))
    return NativeCircuit(
        provenance=draw(PROVENANCE),
        target=draw(TEXT),
        calibrated=draw(st.none() | TEXT),
        device=draw(st.none() | ATTACHMENT),
        lacks_last_layer=draw(st.booleans()),
        transpiler_seed=draw(st.none() | COUNT),
        duration_s=draw(st.none() | st.floats(0, 1)),
        n_target_qubits=n_qubits,
        physical_qubits=tuple(draw(st.permutations(range(n_qubits)))),
        gates=tuple(gates),
        depth=draw(COUNT),
        n_two_qubit_gates=draw(st.integers(0, sum(gate.count for gate in gates))),
        estimated_success_probability=draw(st.none() | st.floats(0, 1)),
        qpy=draw(ATTACHMENT),
    )


@st.composite
def frozen_adapters(draw):
    layout, spec = draw(weight_layouts()), draw(adapter_specs())
    tensors = tuple(tensor.ref for tensor in spec.tensors)
    return FrozenAdapter(
        provenance=draw(PROVENANCE),
        base=spec.base,
        method="lora",
        rank=spec.rank,
        alpha=spec.alpha,
        target_modules=spec.target_modules,
        target_parameters=spec.target_parameters,
        fan_in_fan_out=spec.fan_in_fan_out,
        tensors=tensors,
        arrays=draw(ATTACHMENT),
        probe=draw(ATTACHMENT),
        source=draw(NAME),
        shots=draw(st.none() | POSITIVE),
        weight_error=draw(st.none() | st.floats(0, 9)),
        frozen_loss=draw(st.none() | FLOAT),
        generator=draw(st.none() | NAME),
        context=draw(st.none() | TEXT),
        account=layout.account.model_copy(update={"n_adapter": spec.n_numbers}),
        result=draw(RESULT),
    )


@st.composite
def manifests(draw):
    names = sorted(draw(st.lists(NAME, min_size=1, max_size=4, unique=True)))
    return Manifest(
        provenance=draw(PROVENANCE),
        format=draw(st.sampled_from(["lora", "merged", "onnx-adapter", "gguf"])),
        method=draw(st.sampled_from(["lora", "dora"])),
        dtype=draw(st.sampled_from(["float32", "bfloat16"])),
        base=draw(BASE),
        rank=draw(POSITIVE),
        files=tuple(draw(ATTACHMENT).model_copy(update={"file": name}) for name in names),
        probe=draw(st.sampled_from(names)),
        account=draw(weight_layouts()).account,
        result=draw(RESULT),
        context=draw(st.none() | TEXT),
    )


ANSATZ = st.builds(
    Ansatz,
    kind=NAME,
    n_qubits=st.integers(1, MAX_QUBITS),
    n_layers=POSITIVE,
    entanglement=TEXT,
    n_angles=POSITIVE,
)
MEASUREMENT = st.builds(
    Measurement,
    provenance=PROVENANCE,
    source=NAME,
    backend=st.none() | TEXT,
    target=TEXT,
    shots=st.none() | POSITIVE,
    mitigation=TEXT,
    n_executions=COUNT,
    calibrated=st.none() | TEXT,
    physical_qubits=st.lists(COUNT, max_size=3).map(tuple),
    lacks_last_layer=st.booleans(),
    counts=st.none() | ATTACHMENT,
    circuit=st.none() | ATTACHMENT,
    device=st.none() | ATTACHMENT,
    probabilities=ATTACHMENT,
    distance=st.floats(0, 1),
    context=st.none()
    | st.builds(MeasuredContext, name=st.none() | TEXT, prompt=st.none() | TEXT, vector=ATTACHMENT),
)
LOGICAL_CIRCUIT = st.builds(
    LogicalCircuit,
    provenance=PROVENANCE,
    ansatz=ANSATZ,
    n_circuits=POSITIVE,
    qubit_order=st.just("qubit 0 is the most significant bit"),
    openqasm=ATTACHMENT,
)
SPLIT = st.builds(SplitSummary, **{name: COUNT for name in SplitSummary.model_fields})
DATA = st.builds(
    DataSummary,
    shape=NAME,
    hub=st.lists(st.builds(HubDataset, name=TEXT, revision=st.none() | TEXT), max_size=2).map(tuple),
    chat_template=st.none() | DIGEST,
    training=SPLIT,
    evaluation=SPLIT,
)
TRAINED_CONTEXT = st.builds(
    TrainedContext,
    name=NAME,
    adapter=ATTACHMENT,
    probe=ATTACHMENT,
    n_train_tokens=POSITIVE,
    n_eval_tokens=POSITIVE,
    base_loss=FLOAT,
    eval_loss=FLOAT,
)
CHOSEN_BANK = st.none() | st.builds(ChosenBank, number=COUNT, name=TEXT, slope_share=st.none() | FLOAT)
TRAINED_GENERATOR = st.builds(
    TrainedGenerator,
    provenance=PROVENANCE,
    arrays=ATTACHMENT,
    adapter=ATTACHMENT,
    probe=ATTACHMENT,
    source=NAME,
    shots=st.none() | POSITIVE,
    backend=st.none() | TEXT,
    circuit=st.none() | ATTACHMENT,
    device=st.none() | ATTACHMENT,
    gradient=NAME,
    result=RESULT,
    data=st.none() | DATA,
    contexts=st.lists(TRAINED_CONTEXT, max_size=2).map(tuple),
    bank=CHOSEN_BANK,
)
CHECKPOINT = st.builds(
    Checkpoint,
    provenance=PROVENANCE,
    step=COUNT,
    lr=FLOAT,
    data_digest=DIGEST,
    files=st.lists(ATTACHMENT, max_size=3).map(tuple),
    bank=CHOSEN_BANK,
)
VERIFICATION = st.builds(
    Verification,
    provenance=PROVENANCE,
    tolerance=FLOAT,
    engines=st.lists(
        st.builds(
            EngineCheck,
            engine=TEXT,
            max_logit_difference=FLOAT,
            max_base_difference=FLOAT,
            greedy_tokens=st.lists(COUNT, max_size=4).map(tuple),
            greedy_tokens_equal=st.booleans(),
            missing_keys=st.lists(TEXT, max_size=2).map(tuple),
            unexpected_keys=st.lists(TEXT, max_size=2).map(tuple),
        ),
        max_size=2,
    ).map(tuple),
)
TRIED_CIRCUIT = st.builds(
    TriedCircuit,
    optimization_level=COUNT,
    layouts=POSITIVE,
    transpiler_seed=st.none() | COUNT,
    depth=COUNT,
    n_two_qubit_gates=COUNT,
    estimated_success_probability=st.none() | st.floats(0, 1),
    duration_s=st.none() | st.floats(0, 1),
    n_used_qubits=POSITIVE,
    sha256=DIGEST.map(lambda digest: digest[7:]),
)


@st.composite
def selections(draw):
    circuits = draw(st.lists(TRIED_CIRCUIT, min_size=1, max_size=3))
    shots = draw(POSITIVE)
    strategy = st.builds(
        Strategy,
        circuit=st.integers(0, len(circuits) - 1),
        mitigation=TEXT,
        shots=st.just(shots),
        error=st.floats(0, 1),
        n_executions=st.integers(shots, shots * 9),
        time_s=st.floats(0, 1e6),
        is_non_dominated=st.just(True),
    )
    candidates = draw(st.lists(strategy, min_size=1, max_size=3))
    return Selection(
        provenance=draw(PROVENANCE),
        target=draw(TEXT),
        calibrated=draw(st.none() | TEXT),
        device=draw(ATTACHMENT),
        n_circuits=draw(POSITIVE),
        n_reference_circuits=draw(POSITIVE),
        angle_seed=draw(COUNT),
        sampling_seed=draw(COUNT),
        thinning_seed=draw(COUNT),
        tolerance=draw(st.floats(0, 1)),
        circuits=tuple(circuits),
        candidates=tuple(candidates),
        chosen=draw(st.integers(0, len(candidates) - 1)),
        why=draw(TEXT),
    )


INPUTS = st.lists(st.builds(Input, option=NAME, name=TEXT, digest=DIGEST), max_size=2).map(tuple)


def by_name(record, **fields):
    """Return a strategy of sorted records, no two of one name."""
    lists = st.lists(st.builds(record, name=NAME, **fields), max_size=4, unique_by=lambda one: one.name)
    return lists.map(lambda found: tuple(sorted(found, key=lambda one: one.name)))


CONFIGURATION = st.builds(
    ResolvedConfiguration,
    provenance=PROVENANCE,
    options=by_name(PassOption, value=OPTION_VALUE),
    formats=st.lists(NAME, max_size=3, unique=True).map(tuple),
    inputs=INPUTS,
    trained=st.none() | st.builds(TrainedFrom, document=DIGEST, inputs=INPUTS, n_processes=POSITIVE),
    packages=by_name(Package, version=TEXT),
)
CONTRIBUTION = st.lists(FLOAT, min_size=3, max_size=3).map(
    lambda found: Contribution(low=min(found), value=sorted(found)[1], high=max(found))
)


@st.composite
def explanations(draw):
    n_places, knows = draw(st.integers(0, 4)), draw(st.booleans())
    probability = 1 / (n_places + 1) if knows and n_places else None
    places = tuple(
        PlaceShare(
            layer=draw(st.none() | COUNT),
            module_type=draw(NAME),
            probability=probability,
            squared=draw(st.none() | st.floats(0, 1)),
        )
        for _ in range(n_places)
    )
    names = draw(st.lists(st.tuples(NAME, NAME), max_size=3, unique=True))
    return Explanation(
        provenance=draw(PROVENANCE),
        n_rows=draw(POSITIVE),
        n_tokens=draw(POSITIVE),
        n_evaluations=draw(POSITIVE),
        base_loss=draw(FLOAT),
        trained_loss=draw(FLOAT),
        gain=draw(CONTRIBUTION),
        parts=tuple(
            ExplainedPart(
                kind=kind,
                name=name,
                ablation=draw(st.none() | CONTRIBUTION),
                permutation=draw(st.none() | CONTRIBUTION),
            )
            for kind, name in names
        ),
        places=places,
        directions=draw(
            st.lists(
                st.builds(
                    DirectionShare,
                    number=POSITIVE,
                    probability=st.none() | st.floats(0, 1),
                    squared=st.floats(0, 1),
                ),
                max_size=3,
            ).map(tuple)
        ),
        unused=probability,
    )


SHARED_BASIS = st.builds(
    SharedBasis,
    provenance=PROVENANCE,
    base=BASE,
    banks=st.lists(
        st.builds(Bank, name=TEXT, data_digest=TEXT, n_batches=POSITIVE, batch_size=POSITIVE),
        min_size=1,
        max_size=3,
    ).map(tuple),
    scale=st.floats(1e-3, 1e3),
    lora_config=TEXT,
    tensors=st.lists(
        st.builds(BasisTensor, path=NAME, key=NAME, factor=st.sampled_from("AB"), shape=st.just((2, 3))),
        min_size=1,
        max_size=3,
        unique_by=(lambda one: one.path, lambda one: one.key),
    ).map(tuple),
    arrays=ATTACHMENT,
)


DOCUMENTS = {
    "adapter-spec": adapter_specs(),
    "basis": SHARED_BASIS,
    "weight-layout": weight_layouts(),
    "logical-circuit": LOGICAL_CIRCUIT,
    "native-circuit": native_circuits(),
    "trained-generator": TRAINED_GENERATOR,
    "measurement": MEASUREMENT,
    "frozen-adapter": frozen_adapters(),
    "explanation": explanations(),
    "manifest": manifests(),
    "checkpoint": CHECKPOINT,
    "verification": VERIFICATION,
    "selection": selections(),
    "configuration": CONFIGURATION,
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_a_document_survives_being_written_and_read(kind, data):
    document = data.draw(DOCUMENTS[kind])
    again = KINDS[kind].from_json(document.to_json(), "file")
    assert again == document
    assert again.to_json() == document.to_json()
    assert again.digest == document.digest


def shuffled(value, random):
    if isinstance(value, list):
        return [shuffled(item, random) for item in value]
    if not isinstance(value, dict):
        return value
    keys = list(value)
    random.shuffle(keys)
    return {key: shuffled(value[key], random) for key in keys}


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=golden_id)
@given(random=st.randoms(use_true_random=False), indent=st.sampled_from([None, 0, 3]))
@settings(max_examples=5, deadline=None)
def test_key_order_and_white_space_do_not_change_a_document(file, random, indent):
    text = json.dumps(shuffled(json.loads(file.read_bytes()), random), indent=indent)
    assert kind_of(file).from_json(text.encode(), "file") == read(file)


def test_the_digest_is_of_everything_but_itself():
    _, content = golden("adapter-spec-1/llama")
    claimed = content.pop("digest")
    assert claimed == digest_of(content)
    assert digest_of(content | {"alpha": 5.0}) != claimed


# Damaged and foreign files


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=golden_id)
def test_a_document_edited_by_hand_is_refused_with_its_name(file):
    edited = file.read_bytes().replace(b'"seed": 7', b'"seed": 8')
    assert edited != file.read_bytes()
    with pytest.raises(DocumentError, match=r"^runs/bard/it\.json: expected digest sha256:.*edited or damag"):
        kind_of(file).from_json(edited, "runs/bard/it.json")


def test_a_document_without_a_digest_is_refused():
    kind, content = golden("checkpoint-1/step-10")
    del content["digest"]
    with pytest.raises(DocumentError, match="expected digest None"):
        kind.from_json(json.dumps(content).encode(), "file")


@pytest.mark.parametrize("kind", KINDS)
def test_a_newer_schema_asks_for_a_newer_qpa(kind):
    newer = seal({"schema": f"qpa.{kind}/{KINDS[kind].schema_version() + 1}"})
    with pytest.raises(DocumentError, match=rf"^file: expected schema qpa\.{kind}/.* upgrade this one"):
        KINDS[kind].from_json(newer, "file")


@pytest.mark.parametrize(
    "schema",
    [
        "qpa.weight-layout/1",
        "adapter-spec/1",
        "qpa.adapter-spec",
        "qpa.adapter-spec/",
        "qpa.adapter-spec/0",
        "qpa.adapter-spec/-1",
        "qpa.adapter-spec/1.0",
        "qpa.adapter-spec/" + "9" * 5000,
        1,
        None,
        ["a"],
        "²",
    ],
)
def test_another_kind_or_no_schema_is_refused(schema):
    with pytest.raises(DocumentError, match=r"^file: expected schema qpa\.adapter-spec/1"):
        AdapterSpec.from_json(seal({"schema": schema}), "file")


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"no json", b"\xff\xfe\xfd", b'{"a": 1,}', b"[" * 100_000, b"1" * 5000, b'"\xc3"', b"\x00"],
    ids=lambda text: repr(text[:10]),
)
def test_broken_json_is_refused(text):
    with pytest.raises(DocumentError, match=r"^file: expected a JSON document"):
        AdapterSpec.from_json(text, "file")


@pytest.mark.parametrize("text", [b"[]", b"null", b"3", b'"text"', b"NaN"])
def test_json_that_is_no_object_is_refused(text):
    with pytest.raises(DocumentError, match=r"^file: expected a JSON object"):
        AdapterSpec.from_json(text, "file")


@pytest.mark.parametrize("surrogate", [b'"\\ud800"', b'"\xed\xa0\x80"'], ids=["escaped", "encoded"])
def test_half_a_surrogate_pair_is_refused(surrogate):
    text = b'{"schema": "qpa.adapter-spec/1", "digest": "", "rank": ' + surrogate + b"}"
    with pytest.raises(DocumentError, match=r"^file: "):
        AdapterSpec.from_json(text, "file")


def test_half_a_surrogate_pair_is_called_by_its_name():
    expected = "^file: expected a JSON document, found half of a surrogate pair in a string$"
    with pytest.raises(DocumentError, match=expected):
        AdapterSpec.from_json(b'{"schema": "\\udc00"}', "file")


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=golden_id)
def test_an_unknown_field_is_refused_by_name(file):
    content = json.loads(file.read_bytes()) | {"surprise": 1}
    with pytest.raises(DocumentError, match=f"valid {kind_of(file).kind} document, found surprise: Extra"):
        kind_of(file).from_json(seal(content), "file")


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=golden_id)
def test_every_field_is_required(file):
    content = json.loads(file.read_bytes())
    for key in content.keys() - {"schema", "digest"}:
        less = {name: value for name, value in content.items() if name != key}
        with pytest.raises(DocumentError, match=f"found {key}: Field required"):
            kind_of(file).from_json(seal(less), "file")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rank", "2"),
        ("rank", 2.0),
        ("rank", True),
        ("alpha", "4"),
        ("alpha", float("nan")),
        ("alpha", float("inf")),
        ("fan_in_fan_out", 0),
        ("target_modules", "q_proj"),
        ("method", "tarot"),
    ],
)
def test_types_are_strict(field, value):
    kind, content = golden("adapter-spec-1/llama")
    with pytest.raises(DocumentError, match=f"found {field}"):
        kind.from_json(seal(content | {field: value}), "file")


def mutate(text, changes):
    mutated = bytearray(text)
    for position, action, byte in changes:
        at = position % max(1, len(mutated))
        if action == "replace":
            mutated[at : at + 1] = bytes([byte])
        elif action == "insert":
            mutated.insert(at, byte)
        elif action == "delete":
            del mutated[at : at + byte]
        else:
            del mutated[at:]
    return bytes(mutated)


CHANGE = st.tuples(
    st.integers(0, 2**20),
    st.sampled_from(["replace", "insert", "delete", "replace", "insert", "cut"]),
    st.integers(0, 255),
)


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=golden_id)
@given(changes=st.lists(CHANGE, min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_mutated_bytes_are_refused_or_change_nothing(file, changes):
    mutated = mutate(file.read_bytes(), changes)
    try:
        document = kind_of(file).from_json(mutated, "file")
    except DocumentError as error:
        assert error.subject == "file"
        assert "\n" not in str(error)
    else:
        assert document == read(file)


# A field that is a float keeps these as they are.
EXACT_INTEGERS = st.integers(-(2**53), 2**53)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | EXACT_INTEGERS | st.floats() | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("file", GOLDEN_FILES, ids=golden_id)
@given(data=st.data(), value=JSON_VALUE)
@settings(max_examples=30, deadline=None)
def test_a_sealed_field_of_any_value_is_refused_or_accepted_as_it_is(file, data, value):
    content = json.loads(file.read_bytes())
    key = data.draw(st.sampled_from(sorted(content.keys() - {"schema", "digest"})))
    text = seal(content | {key: value})
    try:
        document = kind_of(file).from_json(text, "file")
    except DocumentError as error:
        assert error.subject == "file"
        return
    newest = json.loads(document.to_json())
    if key in newest:
        assert newest[key] == value
    else:  # an upgrade has moved the field into a record
        assert (document == read(file)) == (content[key] == value)


# Schema upgrades


class Ticket(Document):
    kind: ClassVar[str] = "ticket"
    upgrades: ClassVar = (
        lambda content: content | {"n_seats": content.pop("seats")},
        lambda content: content | {"is_return": False},
    )

    n_seats: int
    is_return: bool


def test_every_older_schema_is_upgraded_and_the_newest_is_written():
    provenance = golden("adapter-spec-3/llama")[1]["provenance"]
    old = {
        1: {"seats": 2},
        2: {"n_seats": 2},
        3: {"n_seats": 2, "is_return": False},
    }
    for version, fields in old.items():
        text = seal({"schema": f"qpa.ticket/{version}", "provenance": provenance, **fields})
        ticket = Ticket.from_json(text, "file")
        assert (ticket.n_seats, ticket.is_return) == (2, False)
        assert json.loads(ticket.to_json())["schema"] == "qpa.ticket/3"
    with pytest.raises(DocumentError, match="upgrade this one"):
        Ticket.from_json(seal({"schema": "qpa.ticket/4"}), "file")


def test_an_upgrade_applies_to_its_own_version_only():
    provenance = golden("adapter-spec-3/llama")[1]["provenance"]
    text = seal({"schema": "qpa.ticket/3", "provenance": provenance, "seats": 2, "is_return": True})
    with pytest.raises(DocumentError, match="ticket document"):
        Ticket.from_json(text, "file")


# Invariants


def put(content, path, value):
    *parents, last = path
    for key in parents:
        content = content[key]
    content[last] = value


def swap_first_two_tensors(content):
    content["tensors"][:2] = content["tensors"][1::-1]


def repeat_first_pair(content):
    content["tensors"] += content["tensors"][:2]


BROKEN = {
    "no tensors": ("adapter-spec-1/llama", (("tensors",), []), "lora_A and lora_B of each module"),
    "half a pair": ("adapter-spec-1/llama", lambda c: c["tensors"].pop(), "lora_A and lora_B of each module"),
    "B before A": ("adapter-spec-1/llama", swap_first_two_tensors, "lora_A must be followed by lora_B"),
    "one module twice": ("adapter-spec-1/llama", repeat_first_pair, "paths must be unique"),
    "B of another module": (
        "adapter-spec-1/llama",
        (("tensors", 1, "module"), "model.layers.9.q_proj"),
        "lora_A must be followed by lora_B",
    ),
    "A of another rank": ("adapter-spec-1/llama", (("tensors", 0, "shape"), [3, 4]), "does not have rank 2"),
    "B of another rank": ("adapter-spec-1/llama", (("tensors", 1, "shape"), [4, 3]), "does not have rank 2"),
    "rank above a side": ("adapter-spec-1/llama", (("tensors", 0, "shape"), [2, 1]), "not within 1 and min"),
    "three sides": ("adapter-spec-1/llama", (("tensors", 0, "shape"), [2, 4, 1]), "tensors.0.shape"),
    "unknown role": ("adapter-spec-1/llama", (("tensors", 0, "role"), "lora_C"), "tensors.0.role"),
    "unknown initial": ("adapter-spec-1/llama", (("tensors", 0, "initial"), "twos"), "tensors.0.initial"),
    "no groups": ("weight-layout-2/aligned", (("groups",), []), "at least one group"),
    "overlap in version 1": ("weight-layout-1/aligned", (("groups", 1, "first_chunk"), 1), "basis states"),
    "few chunks in version 1": ("weight-layout-1/paper", (("groups", 0, "n_chunks"), 7), "do not cover 36"),
    "many chunks in version 1": (
        "weight-layout-1/aligned",
        (("groups", 0, "tensors", 0, "shape"), [10**15, 4]),
        "2 chunks, but tensors use",
    ),
    "countless chunks in version 1": (
        "weight-layout-1/paper",
        (("groups", 0, "n_chunks"), 10**15),
        "not within 0 and 2**24",
    ),
    "no number of chunks in version 1": (
        "weight-layout-1/paper",
        lambda c: c["groups"][0].pop("n_chunks"),
        "n_chunks: Field required",
    ),
    "a state twice": ("weight-layout-2/aligned", (("groups", 1, "states"), [1, 3]), "8 chunks need as many"),
    "a state too high": ("weight-layout-2/aligned", (("groups", 1, "states"), [2, 8]), "8 chunks need as"),
    "a state below 0": ("weight-layout-2/aligned", (("groups", 1, "states"), [2, -1]), "8 chunks need as"),
    "chunk left out": (
        "weight-layout-2/aligned",
        (("groups", 1, "tensors", 0, "chunks"), [1, 1]),
        "2 chunks, but tensors use 1",
    ),
    "chunk that is not there": (
        "weight-layout-2/aligned",
        (("groups", 1, "tensors", 0, "chunks"), [0, 1, 2]),
        "2 chunks, but tensors use 3",
    ),
    "more columns than rank": (
        "weight-layout-2/aligned",
        (("groups", 1, "tensors", 0, "chunks"), [0, 1, 0]),
        "3 columns do not fit rank 2",
    ),
    "columns and spectrum beyond the rank": (
        "weight-layout-2/spectral",
        (("groups", 1, "tensors", 0, "chunks"), [0, 0]),
        "3 columns do not fit its rank",
    ),
    "spectrum without columns": (
        "weight-layout-2/spectral",
        lambda c: c["groups"][4]["tensors"].reverse(),
        "lora_A without chunks and lora_B with chunks in turn",
    ),
    "no chunks": ("weight-layout-2/paper", (("groups", 0, "states"), []), "at least one chunk"),
    "chunks do not cover": (
        "weight-layout-2/paper",
        (("groups", 0, "states"), [0, 1, 2, 3, 4, 5, 6]),
        "do not cover 36",
    ),
    "chunk of size 0": ("weight-layout-2/paper", (("groups", 0, "chunk_size"), 0), "at least one number"),
    "unknown features": ("weight-layout-2/aligned", (("features",), "magic"), "account"),
    "unknown axis": ("weight-layout-2/aligned", (("groups", 0, "axis"), "diagonal"), "groups.0.axis"),
    "half a window": ("weight-layout-2/spectral", (("windows",), {"n_head_qubits": 0}), "n_layer_qubits"),
    "row of another length": (
        "weight-layout-2/aligned",
        (("groups", 0, "tensors", 0, "shape"), [2, 2]),
        "a chunk is one row of 2",
    ),
    "column of another length": (
        "weight-layout-2/aligned",
        (("groups", 1, "tensors", 0, "shape"), [2, 2]),
        "a chunk is one column of 2",
    ),
    "decoder ends elsewhere": (
        "weight-layout-2/aligned",
        (("groups", 0, "decoder_widths"), [2, 5]),
        "must end in chunk_size",
    ),
    "decoder of one width": (
        "weight-layout-2/aligned",
        (("groups", 0, "decoder_widths"), [4]),
        "must end in",
    ),
    "decoder takes others": (
        "weight-layout-2/aligned",
        (("groups", 0, "decoder_widths"), [3, 4]),
        "must take 2 features",
    ),
    "tensor in two groups": (
        "weight-layout-2/aligned",
        (("groups", 1, "tensors", 0, "path"), "model.layers.0.self_attn.q_proj.lora_A.weight"),
        "one group only",
    ),
    "too few qubits": ("weight-layout-2/aligned", (("n_qubits",), 2), "8 chunks need as many of the 2**2"),
    "no layers": ("weight-layout-2/aligned", (("n_layers",), 0), "at least 1"),
    "too many qubits": ("weight-layout-2/aligned", (("n_qubits",), MAX_QUBITS + 1), "qubits within 1"),
    "account of angles": ("weight-layout-2/aligned", (("account", "n_angles"), 17), "the account"),
    "account of own numbers": ("weight-layout-5/direct", (("account", "n_own"), 1), "the account"),
    "nothing generated": ("weight-layout-5/direct", (("parametrized",), []), "or one parametrized tensor"),
    "features without groups": (
        "weight-layout-5/direct",
        (("features", "kind"), "circuit"),
        "0 groups do not read circuit features",
    ),
    "groups without features": (
        "weight-layout-5/aligned",
        (("features", "kind"), "none"),
        "groups do not read none features",
    ),
    "a tensor parametrized twice": (
        "weight-layout-5/direct",
        lambda c: c["parametrized"].append(c["parametrized"][0]),
        "parametrized once",
    ),
    "a tensor parametrized and kept": (
        "weight-layout-5/direct",
        lambda c: c["kept"].append({name: c["parametrized"][0][name] for name in ("path", "shape")}),
        "kept once, in no group and not parametrized",
    ),
    "a parametrized tensor of no numbers": (
        "weight-layout-5/direct",
        (("parametrized", 0, "n_own"), 0),
        "trains at least one number",
    ),
    "a size given twice": (
        "weight-layout-5/direct",
        (("parametrized", 0, "sizes"), [["layers", 1], ["layers", 2]]),
        "a size is given once",
    ),
    "account of decoders": ("weight-layout-2/paper", (("account", "n_decoder"), 1), "the account"),
    "account of the adapter": ("weight-layout-2/paper", (("account", "n_adapter"), 35), "the account"),
    "no circuits": ("logical-circuit-1/three-qubits", (("n_circuits",), 0), "at least 1"),
    "no circuit layers": ("logical-circuit-1/three-qubits", (("n_layers",), 0), "at least 1"),
    "no qubits": ("logical-circuit-1/three-qubits", (("n_qubits",), 0), "qubits within 1"),
    "25 qubits": ("logical-circuit-1/three-qubits", (("n_qubits",), 25), "qubits within 1"),
    "no angles": ("logical-circuit-2/three-qubits", (("ansatz", "n_angles"), 0), "at least 1 angle"),
    "no shots": ("measurement-1/exact", (("shots",), 0), "at least 1 shot"),
    "executions of nothing": ("measurement-1/exact", (("probabilities",), None), "without probabilities"),
    "a distance above 1": ("measurement-1/exact", (("distance",), 1.5), "within 0 and 1"),
    "a circuit that was not tried": (
        "selection-1/belem",
        (("candidates", 0, "circuit"), 2),
        "of the circuits",
    ),
    "an error above 1": ("selection-1/belem", (("candidates", 0, "error"), 1.5), "within 0 and 1"),
    "fewer executions than shots": ("selection-1/belem", (("candidates", 0, "n_executions"), 9), "no fewer"),
    "no candidates": ("selection-1/belem", (("candidates",), []), "must be a candidate"),
    "a chosen one that is dominated": ("selection-1/belem", (("chosen",), 2), "that none dominates"),
    "other bit order": ("logical-circuit-1/three-qubits", (("qubit_order",), "little-endian"), "qubit_order"),
    "one qubit twice": ("native-circuit-1/generic", (("physical_qubits",), [0, 1, 0]), "distinct"),
    "qubit off the device": ("native-circuit-1/generic", (("physical_qubits",), [0, 1, 5]), "target's 5"),
    "negative qubit": ("native-circuit-1/generic", (("physical_qubits",), [0, 1, -1]), "target's 5"),
    "two-qubit gates": ("native-circuit-1/generic", (("n_two_qubit_gates",), 43), "more two-qubit gates"),
    "probability above 1": (
        "native-circuit-1/generic",
        (("estimated_success_probability",), 1.5),
        "within 0 and 1",
    ),
    "probability below 0": (
        "native-circuit-1/generic",
        (("estimated_success_probability",), -0.1),
        "within 0 and 1",
    ),
    "trained on nothing": (
        "trained-generator-1/twenty-steps",
        (("result", "n_train_tokens"), 0),
        "at least one token",
    ),
    "evaluated on nothing": (
        "trained-generator-1/twenty-steps",
        (("result", "n_eval_tokens"), 0),
        "at least one token",
    ),
    "other number of weights": ("frozen-adapter-1/llama", (("account", "n_adapter"), 35), "account's number"),
    "tensor of another rank": ("frozen-adapter-1/llama", (("rank",), 3), "does not have rank 3"),
    "rank 0": ("frozen-adapter-1/llama", (("rank",), 0), "at least 1"),
    "LoRA called DoRA": ("frozen-adapter-2/llama", (("method",), "dora"), "lora_magnitude_vector"),
    "LoRA called IA3": ("frozen-adapter-2/llama", (("method",), "ia3"), "ia3_l"),
    "weights of the base": (
        "frozen-adapter-2/llama",
        (("tensors", 0, "path"), "model.layers.0.mlp.up_proj.weight"),
        "lora_A must be followed by lora_B",
    ),
    "an up wider than its down": (
        "adapter-spec-2/ffa",
        (("tensors", 1, "shape"), [9, 2]),
        "of several modules",
    ),
    "magnitudes of another module": (
        "adapter-spec-2/dora",
        (("tensors", 2, "shape"), [9, 1]),
        "of several modules",
    ),
    "qubits without end": ("weight-layout-2/aligned", (("n_qubits",), 10**12), "qubits within 1 and 24"),
    "windows of more qubits": (
        "weight-layout-2/spectral",
        (("windows", "n_layer_qubits"), 10**12),
        "do not fit",
    ),
    "files not sorted": ("manifest-2/lora", lambda c: c["files"].reverse(), "must be sorted"),
    "one file twice": ("manifest-2/lora", lambda c: c["files"].insert(0, c["files"][0]), "unique"),
    "no probe": ("manifest-2/lora", (("probe",), "probe.safetensors"), "contain the probe"),
    "file outside": ("manifest-2/lora", (("files", 0, "file"), "../README.md"), "inside the document"),
    "absolute file": ("manifest-2/lora", (("files", 0, "file"), "/etc/passwd"), "inside the document"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_invariant_is_refused(case):
    name, change, message = BROKEN[case]
    kind, content = golden(name)
    if callable(change):
        change(content)
    else:
        put(content, *change)
    with pytest.raises(DocumentError) as caught:
        kind.from_json(seal(content), "file")
    assert caught.value.expected == f"a valid {kind.kind} document"
    assert message in caught.value.found


def test_a_document_cannot_be_changed():
    kind, content = golden("adapter-spec-1/llama")
    spec = kind.from_json(seal(content), "file")
    with pytest.raises(ValidationError, match="frozen"):
        spec.rank = 3


def test_names_and_numbers_that_a_spec_derives():
    kind, content = golden("adapter-spec-1/llama")
    spec = kind.from_json(seal(content), "file")
    assert [tensor.path for tensor in spec.tensors[:2]] == [
        "model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.self_attn.q_proj.lora_B.weight",
    ]
    assert spec.n_numbers == 2 * 4 + 4 * 2 + 2 * 6 + 4 * 2


def test_the_account_of_a_layout_adds_up():
    kind, content = golden("weight-layout-2/aligned")
    layout = kind.from_json(seal(content), "file")
    assert layout.account.n_generator == 2 * 3 * 3 + 2 * (4 + 4 + 6 + 4)
    assert layout.account.percent == 100 * 54 / 36
    assert (layout.n_chunks, layout.n_features) == (8, 2)
