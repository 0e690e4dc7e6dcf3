"""The rules a PEFT directory of another kind than LoRA keeps, as qpa exports it: DoRA, IA3, prefix tuning.

L23  adapter_config.json says what `qpa.exporters.formats.peft` writes for the kind and nothing else, so that
     no field changes what the tensors mean.
L24  The tensors are those of the kind, named and shaped as the config says: of DoRA one rank and a magnitude
     for each module; of IA3 [1, in] for feedforward_modules and [out, 1] for others; of a prefix one matrix.
L25  Every number is finite and of a floating-point type.

Source: ours; what PEFT 0.21 reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from qpa.documents import Method
from qpa.documents.finding import Finding
from qpa.errors import DocumentError
from qpa.exporters.contracts.lora import (
    CONFIG_FILE,
    KEY_PREFIX,
    WEIGHTS_FILE,
    JsonObject,
    check_numbers,
    read_config,
    read_tensor_file,
    selects,
)
from qpa.exporters.contracts.manifest import several, short
from qpa.store.tensor_file import TensorFile

PREFIX_KEY = "prompt_embeddings"

_MAGNITUDE = ".lora_magnitude_vector"
_IA3 = ".ia3_l"


def check_peft_contract(directory: Path, method: Method) -> Iterator[Finding]:
    """Yield what an exported directory breaks of the rules of this module.

    Args:    method: of the adapter, as the manifest says.
    """
    try:
        config, file = read_config(directory), read_tensor_file(directory)
    except DocumentError as error:
        yield Finding("L23", short(error.subject), short(error.expected), short(error.found))
        return
    if method not in _FIELDS:
        yield Finding("L23", CONFIG_FILE, "a DoRA, IA3 or prefix tuning", short(method))
        return
    findings = list(_check_fields(config, _FIELDS[method]))
    yield from findings
    if not findings:
        yield from _TENSORS[method](config, file)
    yield from check_numbers("L25", file)


def _is(*values: object) -> Callable[[object], bool]:
    return lambda value: any(
        value is wanted or (type(value), value) == (type(wanted), wanted) for wanted in values
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_revision(value: object) -> bool:
    return value is None or isinstance(value, str)


_Fields = Mapping[str, Callable[[object], bool]]
_COMMON: _Fields = {
    "base_model_name_or_path": _is_text,
    "inference_mode": _is(True),
    "revision": _is_revision,
    "task_type": _is("CAUSAL_LM"),
}
_ON_MODULES: _Fields = {
    **_COMMON,
    "fan_in_fan_out": _is(True, False),
    "target_modules": lambda value: _are_names(value) and bool(value),
}
_FIELDS: dict[str, _Fields] = {
    "dora": {
        **_ON_MODULES,
        "bias": _is("none"),
        "lora_alpha": _is_count,
        "lora_dropout": _is(0.0),
        "peft_type": _is("LORA"),
        "r": _is_count,
        "use_dora": _is(True),
        "use_rslora": _is(False),
    },
    "ia3": {**_ON_MODULES, "feedforward_modules": _are_names, "peft_type": _is("IA3")},
    "prefix": {
        **_COMMON,
        "num_layers": _is_count,
        "num_transformer_submodules": _is(1),
        "num_virtual_tokens": _is_count,
        "peft_type": _is("PREFIX_TUNING"),
        "prefix_projection": _is(False),
    },
}


def _check_fields(config: JsonObject, fields: _Fields) -> Iterator[Finding]:
    if unknown := sorted(config.keys() - fields.keys()):
        yield Finding("L23", CONFIG_FILE, "the fields qpa writes", f"{several(unknown)} too")
    for name, is_right in fields.items():
        if name not in config or not is_right(config[name]):
            found = short(config[name]) if name in config else "none"
            yield Finding("L23", f"{CONFIG_FILE} {name}", "what qpa writes there", found)
    if config.get("peft_type") == "LORA" and config.get("lora_alpha") != config.get("r"):
        yield Finding("L23", f"{CONFIG_FILE} lora_alpha", "r", short(config.get("lora_alpha")))


def _check_dora(config: JsonObject, file: TensorFile) -> Iterator[Finding]:
    shapes = {name: entry.shape for name, entry in file.entries.items()}
    magnitudes = [name for name in shapes if name.endswith(_MAGNITUDE)]
    modules = {name.removeprefix(KEY_PREFIX).removesuffix(_MAGNITUDE) for name in magnitudes}
    wanted = {
        f"{KEY_PREFIX}{m}{end}" for m in modules for end in (".lora_A.weight", ".lora_B.weight", _MAGNITUDE)
    }
    yield from _check_names({*shapes}, wanted, modules, config)
    for module in sorted(modules):
        a, b, m = (
            shapes.get(f"{KEY_PREFIX}{module}{end}", ())
            for end in (".lora_A.weight", ".lora_B.weight", _MAGNITUDE)
        )
        if a[:1] != (config["r"],) or b != (*m, config["r"]) or len(a) != 2 or len(m) != 1:
            found = f"{list(a)}, {list(b)}, {list(m)}"
            yield Finding("L24", short(module), f"[r, in], [out, r] and [out] with r {config['r']}", found)


def _check_ia3(config: JsonObject, file: TensorFile) -> Iterator[Finding]:
    shapes = {name.removeprefix(KEY_PREFIX).removesuffix(_IA3): e.shape for name, e in file.entries.items()}
    wanted = {f"{KEY_PREFIX}{module}{_IA3}" for module in shapes}
    yield from _check_names({*file.entries}, wanted, {*shapes}, config)
    inputs = config["feedforward_modules"]
    assert isinstance(inputs, list)
    for module, shape in sorted(shapes.items()):
        is_input = any(selects(name, module) for name in inputs)
        if len(shape) != 2 or shape[0 if is_input else 1] != 1:
            expected = "[1, in]" if is_input else "[out, 1]"
            yield Finding("L24", short(module), expected, str(list(shape)))


def _check_prefix(config: JsonObject, file: TensorFile) -> Iterator[Finding]:
    n_tokens, n_layers = config["num_virtual_tokens"], config["num_layers"]
    assert isinstance(n_layers, int)
    shape = file.entries[PREFIX_KEY].shape if file.entries.keys() == {PREFIX_KEY} else ()
    if len(shape) != 2 or shape[0] != n_tokens or shape[1] == 0 or shape[1] % (2 * n_layers):
        expected = f"{PREFIX_KEY} [{n_tokens}, 2 * {n_layers} * width] alone"
        found = str(list(shape)) if shape else several(sorted(file.entries) or ["nothing"])
        yield Finding("L24", WEIGHTS_FILE, expected, found)


def _check_names(
    found: set[str], wanted: set[str], modules: set[str], config: JsonObject
) -> Iterator[Finding]:
    if others := sorted(found ^ wanted) or ([] if modules else ["no tensor"]):
        yield Finding("L24", several(others), "the tensors of each module, and no others", "not so")
    targets = config["target_modules"]
    assert isinstance(targets, list)
    alone = sorted(module for module in modules if not any(selects(name, module) for name in targets))
    unused = sorted(name for name in targets if not any(selects(name, module) for module in modules))
    if alone or unused:
        expected = "target_modules that select exactly the modules with tensors"
        yield Finding("L24", several(alone + unused), expected, "others")


_TENSORS: dict[str, Callable[[JsonObject, TensorFile], Iterator[Finding]]] = {
    "dora": _check_dora,
    "ia3": _check_ia3,
    "prefix": _check_prefix,
}
