"""Load a base model's config, weights and tokenizer, and say in one line what is wrong with them.

Everything goes through transformers, from a local directory or the Hub; the model's own Python code
runs only when the user says so in the same call; what a document says is no permission.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qpa.compat.transformers_ import sharded_over
from qpa.documents import BaseModelReference
from qpa.documents.base import digest_of
from qpa.errors import ModelError, OptionError, one_of, one_sentence

DEVICES = ("auto", "cpu", "cuda")

_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
)


_TOKENIZER_FILES = ("*token*", "vocab*", "merges*", "*.model", "*.tiktoken", "*.spm")
"""Patterns of which every tokenizer of transformers has at least one file, such as tokenizer.json."""


def torch_device(name: str) -> str:
    """Return "cpu" or "cuda" for "auto", "cpu" or "cuda".

    Raises:  OptionError: another device, or cuda where there is none.
    """
    import torch

    if name not in DEVICES:
        raise OptionError("device", one_of(DEVICES), name)
    if name == "cuda" and not torch.cuda.is_available():
        raise OptionError("device", "a CUDA device", "none on this machine", "use `device` cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def load_config(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Return the transformers config of a local directory or Hub id.

    Raises:  ModelError: nothing is there, it is no model, or its architecture is unknown.
    """
    from transformers import AutoConfig

    _check_local(name_or_path)
    try:
        return AutoConfig.from_pretrained(
            name_or_path, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # configs check themselves with errors of their own
        raise _model_error(name_or_path, "a causal language model's config", error) from error


def build_on_meta(config: Any, name_or_path: str, *, trust_remote_code: bool = False) -> Any:
    """Return the model on torch's meta device: every module and shape, no weight.

    Raises:  ModelError: transformers has no causal language model for this config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that makes no sense fails anywhere in the constructor
        raise _model_error(name_or_path, "a causal language model", error) from error


def moved_base(base: BaseModelReference, model: str | None) -> BaseModelReference:
    """Return the reference to the same model at another place; None means the place where it was."""
    if model is None:
        return base
    moved = {"name_or_path": model, "local": Path(model).is_dir(), "revision": None}
    return base.model_copy(update=moved)


def load_model(
    base: BaseModelReference,
    *,
    keep_dtype: bool,
    trust_remote_code: bool = False,
    n_shards: int = 1,
    arguments: Mapping[str, Any] = {},
) -> Any:
    """Return the base model with its weights, on the CPU, in eval mode.

    Args:    keep_dtype: keep the checkpoint's own dtype; otherwise float32.
             trust_remote_code: the user allows the model's own Python code to run, now.
             n_shards: processes that load it together, each of them its share, on its own device.
             arguments: further arguments of transformers' `from_pretrained`, such as those of
             `qpa.models.quantization.loading_quantised`.
    Raises:  ModelError: `check_base` refuses the base, there are no weights, they are damaged, or they
             are for another config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = base.name_or_path
    check_base(base, trust_remote_code=trust_remote_code)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            dtype="auto" if keep_dtype else torch.float32,
            output_loading_info=True,
            **({"distributed_config": sharded_over(n_shards)} if n_shards > 1 else {}),
            **arguments,
        )
    except Exception as error:  # the readers below transformers raise types of their own
        raise _model_error(name, "a model with its weights", error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(name, "weights for every parameter", f"none for {missing[0]}{more}")
    return model.eval()


def load_tokenizer(base: BaseModelReference, *, trust_remote_code: bool = False) -> Any:
    """Return the base model's tokenizer.

    Args:    trust_remote_code: the user allows the model's own Python code to run, now.
    Raises:  ModelError: `check_base` refuses the base, there is no tokenizer, or it has no end-of-text
             token.
    """
    from transformers import AutoTokenizer

    name = base.name_or_path
    check_base(base, trust_remote_code=trust_remote_code)
    _check_tokenizer_files(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise _model_error(name, "a tokenizer", error) from error
    if tokenizer.eos_token is None:
        raise ModelError(name, "a tokenizer with an end-of-text token", "none", "set eos_token in its config")
    return tokenizer


def check_base(base: BaseModelReference, *, trust_remote_code: bool) -> None:
    """Check, before any code of the model can run, that a base model may and can be loaded.

    Rules:
    1. A document only records that the model needs its own code; the permission is the user's, each time.
    2. A base that was a local directory is never looked for on the Hub.
    3. config.json says what it said when the adapter was planned.

    Raises:  ModelError: a rule is broken.
    """
    check_permission(base, trust_remote_code=trust_remote_code)
    name = base.name_or_path
    if base.local and not Path(name).is_dir():
        raise ModelError(name, "the base model's directory", "no such directory")
    found = config_file_digest(name, revision=base.revision)
    if found != base.config_digest:
        raise ModelError(
            name,
            f"the config the adapter was planned for ({base.config_digest[:19]})",
            f"another config ({found[:19]})",
            "use the same base model, or plan again",
        )


def check_permission(base: BaseModelReference, *, trust_remote_code: bool) -> None:
    """Check that the user allows what a document says a base model needs.

    Raises:  ModelError: the model needs its own Python code, and the user did not allow it.
    """
    if base.trust_remote_code and not trust_remote_code:
        raise ModelError(
            base.name_or_path,
            "permission to run Python code that comes with the model",
            "none",
            "pass `trust_remote_code` if you trust the model's own Python code",
        )


def config_file_digest(name_or_path: str, *, revision: str | None = None) -> str:
    """Return the digest of what a model's config.json says of shapes and function.

    The file as it is, without keys that change neither: the library's version, the path, the stored
    dtype, the cache switch. What transformers adds to it when it loads it differs from release to
    release, so it does not count, and no code of the model runs.

    Raises:  ModelError: nothing is there, or it is no config.
    """
    from transformers import PreTrainedConfig

    _check_local(name_or_path)
    try:
        content, _ = PreTrainedConfig.get_config_dict(name_or_path, revision=revision)
        return digest_of(_without_volatile(content))
    except Exception as error:  # hostile JSON fails in many ways
        raise _model_error(name_or_path, "a model's config.json", error) from error


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE}
    return [_without_volatile(item) for item in value] if isinstance(value, list) else value


def _check_local(name_or_path: str) -> None:
    path = Path(name_or_path)
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
    looks_local = looks_local or path.parent.is_dir()
    if not path.exists():
        if looks_local and "/" in name_or_path:
            raise ModelError(name_or_path, "a model directory or Hub id", "no such directory")
        return
    config = path / "config.json"
    if not config.is_file():
        found = "no config.json in it" if path.is_dir() else "a file"
        raise ModelError(name_or_path, "a model directory with config.json", found)
    with config.open("rb") as stream:
        if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8:  # transformers would call it no JSON
            advice = "save it as UTF-8 without one"
            raise ModelError(str(config), "JSON that transformers reads", "a byte order mark", advice)


def _check_tokenizer_files(name: str) -> None:
    """Check that a local model has a tokenizer; some kinds are made without files, and know no token."""
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        expected, advice = (
            "a tokenizer in the model's directory",
            "copy the tokenizer's files from where the model comes from",
        )
        raise ModelError(name, expected, "no tokenizer file, such as tokenizer.json", advice)


def _model_error(name: str, expected: str, error: Exception) -> ModelError:
    if isinstance(error, UnicodeEncodeError):
        return ModelError(name, expected, "half of a surrogate pair in a string")
    if isinstance(error, ImportError):
        expected = "the packages that this model needs"
    return ModelError(name, expected, one_sentence(error))
