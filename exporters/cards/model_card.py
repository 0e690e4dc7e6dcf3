"""README.md of an export: the Hub's front matter, the account, the result, how to load it.

Each format's card is a Markdown file of its name beside this one, whose $fields are filled in here; what
stands in all of them is in parts/. The text depends on the frozen adapter and the export's type and rank
only, so the same adapter gets the same card everywhere.

Source: ours; front matter as in the Hub's model card specification.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from string import Template

from qpa import __version__
from qpa.adapters.registry import KINDS
from qpa.documents import BaseModelReference, FrozenAdapter, TrainingResult
from qpa.documents.trained_generator import perplexity_text
from qpa.documents.verification import ENGINES
from qpa.generators.generator import GENERATORS, GeneratorKind
from qpa.models.linear_layers import ABSORBED, last_component
from qpa.models.quantization import QUANTIZATIONS

CARDS = Path(__file__).parent

VLLM_EMBEDDING_ARCHITECTURES = (
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
    *("Qwen3MoeForCausalLM", "GraniteForCausalLM"),
)
"""Those on whose output head and embedding vLLM 0.32 has LoRA; the last two by what their classes say."""

VLLM_DROPS = {"GPTBigCodeForCausalLM": "c_attn"}
"""Layers of an architecture on which vLLM 0.32 reads a LoRA and does not use it, beside the absorbed one."""


def render_card(
    template: str, frozen: FrozenAdapter, *, rank: int, dtype: str, fields: Mapping[str, str] | None = None
) -> str:
    """Return the README.md of an export.

    Args:    template: Markdown with YAML front matter valid for the Hub, and $fields.
             rank, dtype: as written.
             fields: what only this template has, beside the fields of every card.
    Raises:  KeyError: the template has a field that nobody fills in.
    """
    known = _fields(frozen) | {"rank": str(rank), "dtype": dtype} | dict(fields or {})
    return Template(template).substitute(known)


def _fields(frozen: FrozenAdapter) -> dict[str, str]:
    base, note = frozen.base, KINDS[frozen.method].card_note(frozen)
    of_base = "" if base.local else f"base_model: {json.dumps(base.name_or_path)}\nbase_model_relation: "
    return {
        "account": _account(frozen),
        "adapter": adapter_words(frozen),
        "adapter_of": of_base and f"{of_base}adapter\n",
        "base": base_name(frozen),
        "base_arguments": _arguments(base),
        "kind": KINDS[frozen.method].title,
        "merge_of": of_base and f"{of_base}merge\n",
        "modules": adapted_modules(frozen),
        "note": f"\n{note}\n" if note else "",
        "origin": _part("origin", origin=_origin(frozen)),
        "result": _result(frozen),
        "version": __version__,
    }


def _part(name: str, **fields: object) -> str:
    return Template((CARDS / "parts" / f"{name}.md").read_text()).substitute(fields).rstrip("\n")


def base_name(frozen: FrozenAdapter) -> str:
    """Return the base model's name, revision and architecture, as a card says them."""
    base = frozen.base
    revision = f" at revision `{base.revision}`" if base.revision else ""
    return f"`{base.name_or_path}`{revision} ({base.architecture})"


def adapted_modules(frozen: FrozenAdapter) -> str:
    """Return the names of the adapted modules, in code font, or where an adapter is that names none."""
    names = sorted(frozen.target_modules + frozen.target_parameters)
    return KINDS[frozen.method].place or ", ".join(f"`{name}`" for name in names)


def adapter_words(frozen: FrozenAdapter) -> str:
    """Return what kind of adapter it is, with an article."""
    return KINDS[frozen.method].phrase(frozen.rank)


def vllm_rank_option(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that vLLM accepts for a rank, None when there is none."""
    return next((choice for choice in ENGINES["vllm"].ranks if choice >= rank), None)


def targets_head(frozen: FrozenAdapter) -> bool:
    """Return whether the adapter changes the output head."""
    return frozen.base.head in frozen.modules


def _origin(frozen: FrozenAdapter) -> str:
    """Return what the adapter's numbers were in training; those of older runs came of circuits."""
    name = frozen.generator
    return GENERATORS[name].origin if name is not None and name in GENERATORS else GeneratorKind.origin


def _account(frozen: FrozenAdapter) -> str:
    account = frozen.account
    return _part(
        "account",
        kind=KINDS[frozen.method].title,
        trained="\n".join(f"| {words} | {n_trained:,} |" for words, n_trained in account.trained),
        n_generator=f"{account.n_generator:,}",
        n_adapter=f"{account.n_adapter:,}",
        percent=f"{account.percent:.2f}",
    )


def _result(frozen: FrozenAdapter) -> str:
    """Return what the training gained, of which context, and what the base was where it was not as it is."""
    text = _scores(frozen.result) if frozen.result.scores else _losses(frozen.result)
    if frozen.context is not None:
        text = f"{text}\n\n{_part('context', context=frozen.context)}"
    if frozen.result.quantization is None:
        return text
    scored = frozen.frozen_loss
    on_base = "" if scored is None else f" On the base as it is, the loss with this adapter is {scored:.4f}."
    words = QUANTIZATIONS[frozen.result.quantization].words
    return f"{text}\n\n{_part('rounded', words=words, on_base=on_base)}"


def _scores(result: TrainingResult) -> str:
    names = ["loss", *(score.name for score in result.scores)]
    before = [result.base_loss, *(score.base for score in result.scores)]
    after = [result.eval_loss, *(score.adapted for score in result.scores)]
    rows = [f"| {n} | {b:.4f} | {a:.4f} |" for n, b, a in zip(names, before, after, strict=True)]
    return _part(
        "scores",
        objective=result.objective,
        rows="\n".join(rows),
        n_eval_tokens=f"{result.n_eval_tokens:,}",
        n_steps=f"{result.n_steps:,}",
        n_train_tokens=f"{result.n_train_tokens:,}",
    )


def _losses(result: TrainingResult) -> str:
    return _part(
        "result",
        n_eval_tokens=f"{result.n_eval_tokens:,}",
        base_loss=f"{result.base_loss:.4f}",
        base_perplexity=perplexity_text(result.base_loss),
        eval_loss=f"{result.eval_loss:.4f}",
        eval_perplexity=perplexity_text(result.eval_loss),
        n_steps=f"{result.n_steps:,}",
        n_train_tokens=f"{result.n_train_tokens:,}",
    )


def _arguments(base: BaseModelReference) -> str:
    """Return the arguments that load the base model in transformers."""
    arguments = json.dumps(base.name_or_path)
    if base.revision:
        arguments += f", revision={json.dumps(base.revision)}"
    if base.trust_remote_code:
        arguments += ", trust_remote_code=True"
    return arguments


def loading_in_vllm(frozen: FrozenAdapter, rank: int) -> str:
    """Return how vLLM loads a LoRA of a rank, or why it does not, as Markdown."""
    option = vllm_rank_option(rank)
    if frozen.fan_in_fan_out:
        return (
            "vLLM: it has no LoRA for models built from Conv1D layers such as GPT-2; merge the adapter first."
        )
    if option is None:
        return f"vLLM: it serves ranks up to {ENGINES['vllm'].ranks[-1]}; merge the adapter first."
    if frozen.base.architecture not in VLLM_EMBEDDING_ARCHITECTURES and (
        targets_head(frozen) or frozen.embeddings
    ):
        place = "output head" if targets_head(frozen) else "embedding"
        return f"vLLM: it has no LoRA on this model's {place}; merge the adapter first."
    dropped = {ABSORBED, VLLM_DROPS.get(frozen.base.architecture)}
    if found := dropped & {last_component(module) for module in frozen.modules}:
        name = min(name for name in found if name)
        return f"vLLM: it would leave the LoRA on `{name}` out without a word; merge the adapter first."
    base = frozen.base
    command = f"vllm serve {shlex.quote(base.name_or_path)} --enable-lora"
    if base.revision:
        command += f" --revision {shlex.quote(base.revision)}"
    if base.trust_remote_code:
        command += " --trust-remote-code"
    if option > ENGINES["vllm"].ranks[0]:
        command += f" --max-lora-rank {option}"
    return _part("vllm", command=f"{command} --lora-modules adapter=path/to/this/directory")
