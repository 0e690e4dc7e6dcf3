"""The rules a LoRA directory must keep to load, with the same meaning, in every engine.

A deviation is loud in one engine and silent in the next, which then serves the base model or a wrong
scale. Rules, each checked without torch and without the base model:

L01  adapter_config.json and adapter_model.safetensors are there, as files.
L02  Every file is readable by everyone (safetensors writes mode 0600 whatever the umask).
L03  No pickle file, and no other safetensors file at the top level.
L04  The config is a JSON object with peft_type LORA, task_type CAUSAL_LM, an integer r >= 1, the base's
     name as base_model_name_or_path, inference_mode true and fan_in_fan_out true or false. A
     lora_dropout, where there is one, is a number within 0 and 1.
L05  target_modules is an explicit list of names (SGLang refuses a regular expression), which may be empty
     where target_parameters, a list too, names what PEFT selects by the name of a parameter.
L06  lora_alpha == r, so that the scaling is 1 even where it is ignored.
L07  No rsLoRA (the GGUF converter and SGLang ignore its scaling).
L08  No DoRA (transformers computes something else, vLLM refuses).
L09  No rank_pattern and no alpha_pattern.
L10  bias is "none", and there is no lora_bias.
L11  No modules_to_save, no other part that is more than B A x, and no other choice of modules than
     target_modules makes.
L12  init_lora_weights is of a kind that leaves the base weights alone (not pissa, olora, corda ..).
L13  The safetensors file is whole, and its metadata says {"format": "pt"}.
L14  Keys are base_model.model.<module>.lora_A.weight or .lora_B.weight, of an embedding .lora_embedding_A
     or .lora_embedding_B, without an adapter's name. The
     module path neither repeats the prefix nor starts at the layers: a causal language model of
     transformers has them below an attribute, so such a key has lost one component.
L15  Every lora_A has its lora_B, every lora_B its lora_A.
L16  Every tensor is 2-D and of a floating-point type.
L17  Every number is finite.
L18  One rank: every lora_A is [r, in] and every lora_B is [out, r] with the config's r. Of experts that
     target_parameters names, all are in one tensor, [n r, in] and [out, n r].
L19  target_modules and target_parameters select exactly the modules that have tensors, as PEFT matches names.
L20  With a qpa/manifest.json: it is valid, no file is missing or extra but qpa/verification.json, and every
     SHA-256 is right.

Source: ours; each rule was seen to matter in PEFT, transformers, vLLM, SGLang or the GGUF converter.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from qpa.adapters.peft_directory import are_names, are_targets, is_count
from qpa.compat.peft_ import CONFIG_FILE, KEY_PREFIX, WEIGHTS_FILE, parameter_inside
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, several, short
from qpa.errors import DocumentError
from qpa.exporters.contracts.manifest import check_files, check_manifest, collected
from qpa.models.linear_layers import selects
from qpa.store.tensor_file import TensorEntry, TensorFile

MAX_JSON_BYTES = 16 << 20
MAX_JSON_DEPTH = 32

_ROLES = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING_ROLES = (".lora_embedding_A", ".lora_embedding_B")
_A = (_ROLES[0], _EMBEDDING_ROLES[0])
_ALL_ROLES = _ROLES + _EMBEDDING_ROLES
_WEIGHT = ".weight"
_HARMLESS_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica", "lora_ga")
_NO_MODULE_STARTS = ("base_model.", "layers.", "h.", "blocks.")
_MORE_THAN_LORA = (
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
    "megatron_config",
)
_OTHER_CHOICES = ("exclude_modules", "layers_to_transform", "layers_pattern")
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")

T = TypeVar("T")


def check_lora_contract(directory: Path) -> tuple[Finding, ...]:
    """Check an adapter directory of any origin against the rules of this module.

    Args:    directory: it is only read; hostile content gives findings, never an exception.
    Returns: all findings, by rule; () when the directory keeps the contract.
    Source:  ours.
    """
    findings = collected(_check(directory), "L01", directory)
    return tuple(sorted(findings, key=lambda finding: finding.rule))


def _check(directory: Path) -> Iterator[Finding]:
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (directory / name).is_file()]
    for name in missing:
        found = "nothing" if directory.is_dir() else "no such directory"
        yield Finding("L01", short(directory / name), "a file", found)
    if len(missing) == 2:
        return
    yield from check_files(directory)
    yield from _check_weights_alone(directory)
    yield from check_manifest(directory)
    config: JsonObject | None = None
    file: TensorFile | None = None
    if CONFIG_FILE not in missing:
        config = yield from _tried("L04", read_config, directory)
    if WEIGHTS_FILE not in missing:
        file = yield from _tried("L13", read_tensor_file, directory)
    if config is not None:
        yield from _check_config(config)
    if file is not None:
        if file.metadata.get("format") != "pt":
            yield Finding("L13", WEIGHTS_FILE, 'metadata {"format": "pt"}', short(dict(file.metadata)))
        yield from _check_keys(file.entries)
        yield from _check_numbers(file)
    if config is not None and file is not None:
        yield from _check_rank(config, file.entries)
        yield from _check_targets(config, file.entries)


def _check_weights_alone(directory: Path) -> Iterator[Finding]:
    other = [path.name for path in directory.glob("*.safetensors") if path.name != WEIGHTS_FILE]
    if other:
        yield Finding("L03", several(sorted(other)), f"{WEIGHTS_FILE} alone", "another weights file")


def _tried(rule: str, read: Callable[[Path], T], directory: Path) -> Generator[Finding, None, T | None]:
    """Yield what keeps a file from being read; the generator's return value is what was read, or None."""
    try:
        return read(directory)
    except DocumentError as error:
        yield Finding(rule, error.subject, error.expected, error.found)
        return None


def read_config(directory: Path) -> JsonObject:
    """Return the adapter_config.json of a directory of any origin.

    Raises:  DocumentError: it is too long, too deep, or no JSON object.
    """
    path = directory / CONFIG_FILE
    n_bytes = path.stat().st_size
    if n_bytes > MAX_JSON_BYTES:
        raise DocumentError(CONFIG_FILE, f"at most {MAX_JSON_BYTES} bytes", f"{n_bytes} bytes")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        found = short(f"{type(error).__name__}: {error}")
        raise DocumentError(CONFIG_FILE, "a JSON object", found) from error
    if not isinstance(config, dict):
        raise DocumentError(CONFIG_FILE, "a JSON object", f"a {type(config).__name__}")
    if not _is_shallow(config):
        raise DocumentError(CONFIG_FILE, f"at most {MAX_JSON_DEPTH} levels of JSON", "more")
    return config


def _is_shallow(content: object) -> bool:
    level = [content]
    for _ in range(MAX_JSON_DEPTH):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level if isinstance(v, (dict, list))]
        level = [value for values in inner for value in values]
    return not level


def read_tensor_file(directory: Path) -> TensorFile:
    """Return type, shape and place of every tensor in a directory of any origin.

    Raises:  DocumentError: adapter_model.safetensors is missing, cut short, or no safetensors file.
    """
    path = directory / WEIGHTS_FILE
    try:
        return TensorFile.open(path)
    except DocumentError as error:
        raise DocumentError(WEIGHTS_FILE, error.expected, short(error.found)) from error


def _check_config(config: JsonObject) -> Iterator[Finding]:
    for name, value in (("peft_type", "LORA"), ("task_type", "CAUSAL_LM")):
        if config.get(name) != value:
            yield _field(config, "L04", name, f'"{value}"')
    if not is_count(config.get("r")):
        yield _field(config, "L04", "r", "an integer of at least 1")
    elif not _is_number(config.get("lora_alpha")) or config["lora_alpha"] != config["r"]:
        yield _field(config, "L06", "lora_alpha", f"r, {short(config['r'])}")
    yield from _check_field_types(config)
    parameters = config.get("target_parameters") or []
    if not are_names(parameters):
        yield _field(config, "L05", "target_parameters", "a list of parameter names")
    if not (are_names if parameters else are_targets)(config.get("target_modules")):
        yield _field(config, "L05", "target_modules", "an explicit list of module names")
    if config.get("bias", "none") != "none":
        yield _field(config, "L10", "bias", '"none"')
    for rule, name in (("L07", "use_rslora"), ("L08", "use_dora"), ("L10", "lora_bias")):
        if config.get(name):
            yield _field(config, rule, name, "false")
    for rule, name in (
        ("L09", "rank_pattern"),
        ("L09", "alpha_pattern"),
        *(("L11", name) for name in _MORE_THAN_LORA + _OTHER_CHOICES),
    ):
        if _is_set(config.get(name)):
            yield _field(config, rule, name, "nothing")
    initial = config.get("init_lora_weights")
    if not any(initial is kind or (isinstance(kind, str) and initial == kind) for kind in _HARMLESS_INITS):
        yield _field(config, "L12", "init_lora_weights", "true or a kind that leaves the base weights alone")


def _check_field_types(config: JsonObject) -> Iterator[Finding]:
    name = config.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        yield _field(config, "L04", "base_model_name_or_path", "the base model's name")
    if config.get("inference_mode") is not True:
        yield _field(config, "L04", "inference_mode", "true")
    if not isinstance(config.get("fan_in_fan_out"), bool):
        yield _field(config, "L04", "fan_in_fan_out", "true or false")
    dropout = config.get("lora_dropout", 0.0)
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
        yield _field(config, "L04", "lora_dropout", "a number within 0 and 1")


def _check_keys(tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    if not tensors:
        yield Finding("L14", WEIGHTS_FILE, "lora_A and lora_B tensors", "no tensor")
    prefix = [name for name in tensors if not _has_right_prefix(name)]
    if prefix:
        yield Finding("L14", several(prefix), f"one prefix {KEY_PREFIX}", "another prefix")
    ending = [name for name in tensors if not name.endswith(_ALL_ROLES)]
    if ending:
        named = any(f"{role.removesuffix('.weight')}." in name for name in ending for role in _ALL_ROLES)
        found = "an adapter's name in the key" if named else "another ending"
        yield Finding("L14", several(ending), "a key ending in .lora_A.weight or .lora_B.weight", found)
    for role, other in (_ROLES, _ROLES[::-1], _EMBEDDING_ROLES, _EMBEDDING_ROLES[::-1]):
        alone = [
            name for name in tensors if name.endswith(role) and name.removesuffix(role) + other not in tensors
        ]
        if alone:
            yield Finding(
                "L15", several(alone), f"a {other[1:].removesuffix('.weight')} of the same module", "none"
            )


def _check_numbers(file: TensorFile) -> Iterator[Finding]:
    shapes = [name for name, tensor in file.entries.items() if len(tensor.shape) != 2]
    if shapes:
        found = f"shape {short(file.entries[shapes[0]].shape)}"
        yield Finding("L16", several(shapes), "a 2-D tensor", found)
    yield from check_numbers("L17", file)


def check_numbers(rule: str, file: TensorFile) -> Iterator[Finding]:
    """Yield the tensors that are not of a floating-point type (L16), or not finite."""
    types = [name for name, tensor in file.entries.items() if tensor.dtype not in _FLOAT_TYPES]
    if types:
        yield Finding("L16", several(types), "a floating-point type", file.entries[types[0]].dtype)
    broken = [name for name in file.entries if name not in types and not _is_finite(file, name)]
    if broken:
        yield Finding(rule, several(broken), "finite numbers", "NaN or infinity")


def _is_finite(file: TensorFile, name: str) -> bool:
    return all(bool(np.all(np.isfinite(block))) for block in file.blocks(name))


def _check_rank(config: JsonObject, tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    rank = config.get("r")
    if not isinstance(rank, int) or not is_count(rank):
        return
    ranks = {
        name: tensor.shape[0 if name.endswith(_A) else 1]
        for name, tensor in tensors.items()
        if name.endswith(_ALL_ROLES) and len(tensor.shape) == 2
    }
    n_stacked = _n_stacked(config, ranks, rank)
    wrong = [name for name in ranks if ranks[name] != rank * n_stacked.get(module_of_key(name), 1)]
    if wrong:
        found = ", ".join(str(value) for value in sorted({ranks[name] for name in wrong})[:4])
        yield Finding("L18", several(wrong), f"rank {short(rank)}, as in {CONFIG_FILE}", f"rank {found}")


def _n_stacked(config: JsonObject, ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Return how many experts the tensors of a module are of, for modules of fused parameters."""
    names = [name for name in _parameters(config) if not name.endswith(_WEIGHT)]
    modules = {module_of_key(name): n // rank for name, n in ranks.items() if name.endswith(_A)}
    return {module: n for module, n in modules.items() if n and any(_holds(name, module) for name in names)}


def _parameters(config: JsonObject) -> list[str]:
    names = config.get("target_parameters")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _holds(parameter: str, module: str) -> bool:
    """Return whether PEFT puts the adapter of a parameter on a module; of two, one is inside the other."""
    return selects(parameter.rpartition(".")[0], module.removesuffix(parameter_inside("")))


def _check_targets(config: JsonObject, tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    targets, parameters = config.get("target_modules"), _parameters(config)
    if not isinstance(targets, list) or not (are_names if parameters else are_targets)(targets):
        return
    modules = {
        module_of_key(name) for name in tensors if name.endswith(_ALL_ROLES) and _has_right_prefix(name)
    }
    untargeted = sorted(
        module
        for module in modules
        if not any(selects(t, module) for t in targets) and not any(_holds(p, module) for p in parameters)
    )
    if untargeted:
        yield Finding("L19", several(untargeted), "a module that target_modules selects", "tensors only")
    unused = sorted({t for t in targets if not any(selects(t, module) for module in modules)})
    if unused:
        yield Finding("L19", f"target_modules {several(unused)}", "tensors of that module", "none")
    without = sorted({p for p in parameters if not any(_holds(p, module) for module in modules)})
    if without:
        yield Finding("L19", f"target_parameters {several(without)}", "tensors of that module", "none")


def module_of_key(key: str) -> str:
    """Return the module path inside the base model of a key that keeps rule L14."""
    return key.removeprefix(KEY_PREFIX).rpartition(".lora_")[0]


def _has_right_prefix(key: str) -> bool:
    module = key.removeprefix(KEY_PREFIX)
    return key.startswith(KEY_PREFIX) and not module.startswith(_NO_MODULE_STARTS)


def _is_set(value: object) -> bool:
    """Return whether a field says something; a layer's index may be 0."""
    return value is not None and value is not False and value not in ([], {}, "")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _field(config: JsonObject, rule: str, name: str, expected: str) -> Finding:
    return Finding(rule, f"{CONFIG_FILE} {name}", expected, short(config.get(name, "nothing")))
