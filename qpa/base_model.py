"""Load a base model's config, weights and tokenizer, and say in one line what is wrong with them.

Everything goes through transformers, from a local directory or the Hub; the model's own Python code
runs only when the user said so.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpa.documents import BaseModelReference
from qpa.documents.base import digest_of
from qpa.errors import ModelError

_VOLATILE = frozenset(
    {"transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures"}
)


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
    except Exception as error:  # a config of no sense fails anywhere in the model's constructor
        raise _model_error(name_or_path, "a causal language model", error) from error


def load_model(base: BaseModelReference, *, keep_dtype: bool, config: Any = None) -> Any:
    """Return the base model with its weights, on the CPU, in eval mode.

    Args:    keep_dtype: keep the checkpoint's own dtype; otherwise float32.
             config: used instead of reading it again.
    Raises:  ModelError: there are no weights, they are damaged, they are for another config, or the
             config is not the one the adapter was planned for.
    """
    import torch
    from transformers import AutoModelForCausalLM

    name = base.name_or_path
    config = config or load_config(name, revision=base.revision, trust_remote_code=base.trust_remote_code)
    check_config(base, config)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            dtype="auto" if keep_dtype else torch.float32,
            output_loading_info=True,
        )
    except Exception as error:  # the readers below transformers raise types of their own
        raise _model_error(name, "a model with its weights", error) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            name, "weights for every parameter", f"none for {missing[0]} and {len(missing) - 1} more"
        )
    return model.eval()


def load_tokenizer(base: BaseModelReference) -> Any:
    """Return the base model's tokenizer.

    Raises:  ModelError: there is none, or it has no end-of-text token.
    """
    from transformers import AutoTokenizer

    name = base.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises plain Exception
        raise _model_error(name, "a tokenizer", error) from error
    if tokenizer.eos_token is None:
        raise ModelError(name, "a tokenizer with an end-of-text token", "none", "set eos_token in its config")
    return tokenizer


def config_digest(config: Any) -> str:
    """Return the digest of what in a transformers config decides shapes and function.

    The library's version, the path, the stored dtype and the cache switch are left out.
    """
    content = json.loads(config.to_json_string(use_diff=False))
    return digest_of({key: value for key, value in content.items() if key not in _VOLATILE})


def check_config(base: BaseModelReference, config: Any) -> None:
    """Check that a config is the one an adapter was planned for.

    Raises:  ModelError: it is another.
    """
    found = config_digest(config)
    if found != base.config_digest:
        raise ModelError(
            base.name_or_path,
            f"the config the adapter was planned for ({base.config_digest[:19]})",
            f"{config.model_type} config {found[:19]}",
            "use the same base model, or plan again",
        )


def _check_local(name_or_path: str) -> None:
    path = Path(name_or_path)
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") != 1
    if not path.exists():
        if looks_local and "/" in name_or_path:
            raise ModelError(name_or_path, "a model directory or Hub id", "no such directory")
        return
    if not (path / "config.json").is_file():
        found = "no config.json in it" if path.is_dir() else "a file"
        raise ModelError(name_or_path, "a model directory with config.json", found)


def _model_error(name: str, expected: str, error: Exception) -> ModelError:
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ModelError(name, expected, first_line[:300])
