"""README.md of an export: the Hub's front matter, the account, the result, how to load it.

The text depends on the frozen adapter only, so the same adapter gets the same card everywhere.
"""

from __future__ import annotations

import json
import shlex

from qpa import __version__
from qpa.documents import METHOD_NAMES, BaseModelReference, FrozenAdapter
from qpa.documents.trained_generator import perplexity_text
from qpa.documents.verification import ENGINES

VLLM_EMBEDDING_ARCHITECTURES = (
    *("LlamaForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM"),
    *("Qwen3MoeForCausalLM", "GraniteForCausalLM"),
)
"""Those on whose output head and embedding vLLM 0.32 has LoRA; the last two by what their classes say."""


def model_card(frozen: FrozenAdapter, rank: int | None = None) -> str:
    """Return the README.md of an adapter exported as LoRA.

    Args:    frozen: what is exported.
             rank: as written; None for the adapter's own, without padding.
    Returns: Markdown with YAML front matter valid for the Hub.
    Source:  ours; front matter as in the Hub's model card specification.
    """
    return format_card(
        frozen,
        title="LoRA adapter",
        library="peft",
        tags=("lora", "peft"),
        what=_what(frozen, rank or frozen.rank),
        loading=_loading(frozen, rank or frozen.rank),
    )


def format_card(
    frozen: FrozenAdapter,
    *,
    title: str,
    library: str,
    tags: tuple[str, ...],
    what: str,
    loading: str,
    relation: str = "adapter",
) -> str:
    """Return the README.md of an export.

    Args:    title: what it is, in two words or three.
             library, tags, relation: for the Hub's front matter; relation is "adapter", "merge" or
             "quantized".
             what: a paragraph: what the files are and which modules are adapted.
             loading: Markdown: how to load it in each engine that can.
    """
    parts = (
        _front_matter(frozen.base, library, tags, relation),
        f"# {title} made by qpa {__version__}",
        what,
        _account(frozen),
        _result(frozen),
        "## Loading",
        loading,
    )
    return "\n\n".join(parts) + "\n"


def origin() -> str:
    """Return the sentence on where the weights come from, the same in every card, without its full stop."""
    return (
        "During training its weights were\nproduced by a small generator around a parameterised quantum "
        "circuit, which was then evaluated once and left\nbehind. **Nothing quantum is needed to serve it**"
    )


def base_name(frozen: FrozenAdapter) -> str:
    """Return the base model's name, revision and architecture, as a card says them."""
    base = frozen.base
    revision = f" at revision `{base.revision}`" if base.revision else ""
    return f"`{base.name_or_path}`{revision} ({base.architecture})"


def adapted_modules(frozen: FrozenAdapter) -> str:
    """Return the names of the adapted modules, in code font; a prefix is not of any."""
    if frozen.method == "prefix":
        return "the attention of every layer"
    return ", ".join(f"`{name}`" for name in sorted(frozen.target_modules))


def adapter_words(frozen: FrozenAdapter) -> str:
    """Return what kind of adapter it is, with an article."""
    name = METHOD_NAMES[frozen.method]
    return {
        "ia3": f"an {name}",
        "prefix": f"a prefix of {frozen.rank} virtual tokens",
        "ffa": f"a {name} of width {frozen.rank} behind every block",
    }.get(frozen.method, f"a rank-{frozen.rank} {name}")


def vllm_rank_option(rank: int) -> int | None:
    """Return the smallest `--max-lora-rank` that vLLM accepts for a rank, None when there is none."""
    return next((choice for choice in ENGINES["vllm"].ranks if choice >= rank), None)


def targets_head(frozen: FrozenAdapter) -> bool:
    """Return whether the adapter changes the output head."""
    return frozen.base.head in frozen.modules


def _front_matter(base: BaseModelReference, library: str, tags: tuple[str, ...], relation: str) -> str:
    lines = ["---"]
    if not base.local:
        lines += [f"base_model: {json.dumps(base.name_or_path)}", f"base_model_relation: {relation}"]
    lines += [f"library_name: {library}", "pipeline_tag: text-generation", "tags:"]
    return "\n".join([*lines, *(f"- {tag}" for tag in (*tags, "qpa")), "---"])


def _what(frozen: FrozenAdapter, rank: int) -> str:
    return f"""A plain rank-{rank} LoRA for {base_name(frozen)}. {origin()}: no quantum hardware, no
simulator, no qpa, only the tensors of `adapter_model.safetensors`.

Adapted modules: {adapted_modules(frozen)}.
The scaling is folded into `lora_B`, so `lora_alpha` equals `r`."""


def _account(frozen: FrozenAdapter) -> str:
    account, name = frozen.account, METHOD_NAMES[frozen.method]
    return f"""## Trained parameters

| | numbers |
|---|---:|
| circuit angles | {account.n_angles:,} |
| decoder | {account.n_decoder:,} |
| generator in total | {account.n_generator:,} |
| the same {name} without a generator | {account.n_adapter:,} |
| generator in percent of {name} | {account.percent:.2f} % |"""


def _result(frozen: FrozenAdapter) -> str:
    result = frozen.result
    return f"""## Result

| on {result.n_eval_tokens:,} evaluation tokens | loss (nats per token) | perplexity |
|---|---:|---:|
| base model | {result.base_loss:.4f} | {perplexity_text(result.base_loss)} |
| with this adapter | {result.eval_loss:.4f} | {perplexity_text(result.eval_loss)} |

{result.n_steps:,} optimizer steps; {result.n_train_tokens:,} tokens in the training split. Only real tokens
count, padding does not."""


def loading_in_peft(frozen: FrozenAdapter) -> str:
    """Return how PEFT loads a directory, as Markdown."""
    return f"""PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({_arguments(frozen)})
model = PeftModel.from_pretrained(base, "path/to/this/directory")
```"""


def _arguments(frozen: FrozenAdapter) -> str:
    """Return the arguments that load the base model in transformers."""
    arguments = json.dumps(frozen.base.name_or_path)
    if frozen.base.revision:
        arguments += f", revision={json.dumps(frozen.base.revision)}"
    if frozen.base.trust_remote_code:
        arguments += ", trust_remote_code=True"
    return arguments


def _loading(frozen: FrozenAdapter, rank: int) -> str:
    return f"""{loading_in_peft(frozen)}

transformers:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({_arguments(frozen)})
model.load_adapter("path/to/this/directory")
```

{_loading_in_vllm(frozen, rank)}"""


def _loading_in_vllm(frozen: FrozenAdapter, rank: int) -> str:
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
    base = frozen.base
    command = f"vllm serve {shlex.quote(base.name_or_path)} --enable-lora"
    if base.revision:
        command += f" --revision {shlex.quote(base.revision)}"
    if base.trust_remote_code:
        command += " --trust-remote-code"
    if option > ENGINES["vllm"].ranks[0]:
        command += f" --max-lora-rank {option}"
    return f"vLLM:\n\n```sh\n{command} --lora-modules adapter=path/to/this/directory\n```"
