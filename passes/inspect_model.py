"""inspect-model: from a base model's config to the tensors of an adapter.

Rules:
1. Only the config is read; the model is built on the meta device.
2. Every kind of adapter has targets of its own where none are given: LoRA and DoRA "all-linear", IA3 the
   keys, values and feed-forward blocks, the feed-forward adapter these blocks, a prefix none.
   "all-linear" is every Linear and Conv1D except the output head; names select by the last
   components of the module path, as PEFT does, and may select the head, and for LoRA the embedding.
   Several targets add up.
   Of fused experts (one 3-D parameter for all of a layer) LoRA adapts every expert's layers
   (`qpa.adapters.experts`). Where PEFT cannot, or for other kinds of adapters, "all-linear" does not leave
   them out in silence but asks for names, and names that PEFT would take for the experts are refused.
   Of a model that also sees or hears, only the language model and the head are adapted.
3. target_modules of the result is the shortest list of names that selects exactly these modules in
   PEFT: module types where they are unambiguous, full paths where they are not.
4. The tensors are those of `qpa.adapters.tensors`.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast, final

from qpa.adapters.experts import EXPERT_LAYERS, expert_sides, has_experts, needs_down
from qpa.adapters.tensors import (
    FEED_FORWARD_BLOCKS,
    IA3_TARGETS,
    module_tensors,
    prefix_tensors,
    scales_inputs,
)
from qpa.documents import METHOD_NAMES, AdapterSpec, BaseModelReference, Document, Method
from qpa.errors import ModelError, OptionError, one_of
from qpa.models.base_model import build_on_meta, config_file_digest, load_config
from qpa.pipeline.pass_protocol import PassContext

ALL_LINEAR = "all-linear"
METHODS = tuple(METHOD_NAMES)
DEFAULT_RANK = {"lora": 32, "dora": 32, "ia3": 1, "prefix": 16, "ffa": 16}
"""Rank, width of a feed-forward adapter, or tokens of a prefix."""


@final
@dataclass(frozen=True, slots=True)
class InspectModel:
    """Find the modules to adapt and the shapes of their adapter.

    Args:    model: local directory or Hub id.
             rank: of LoRA and DoRA, width of a feed-forward adapter, tokens of a prefix; None means
             DEFAULT_RANK, or the smallest side of a module that LoRA or DoRA adapts where that is less.
             alpha: of LoRA and DoRA; None means 2 * rank, as in arXiv 2410.09846.
             targets: "all-linear", module names, or both; None means the method's own.
             method: "lora", "dora", "ia3", "prefix" or "ffa".
             trust_remote_code: the user allows the model's own Python code to run.
    Source:  ours.
    """

    name: ClassVar[str] = "inspect-model"
    consumes: ClassVar[type] = type(None)
    requires: ClassVar[tuple[type[Document], ...]] = ()
    produces: ClassVar[type[Document]] = AdapterSpec

    model: str
    rank: int | None = None
    alpha: float | None = None
    targets: tuple[str, ...] | None = None
    method: str = "lora"
    revision: str | None = None
    trust_remote_code: bool = False

    def run(self, source: None, context: PassContext) -> AdapterSpec:
        """Build the model on the meta device and describe its adapter.

        Raises:  OptionError: method, rank or alpha out of range, a target that matches nothing, or
                 all-linear on a model with fused experts, or a name that PEFT takes for these.
                 ModelError: no config, an unknown architecture, or nothing to adapt.
        """
        self._check_options()
        config = load_config(self.model, revision=self.revision, trust_remote_code=self.trust_remote_code)
        model = build_on_meta(config, self.model, trust_remote_code=self.trust_remote_code)
        head = _head_path(model)
        if self.method == "prefix":
            return self._prefix(config, model, head, context)
        chosen = self._choose(model, head)
        rank = self._rank(chosen)
        method = cast(Method, self.method)
        spec = AdapterSpec(
            provenance=context.provenance(self, None),
            base=self._reference(config, model, head),
            method=method,
            rank=rank,
            alpha=self._alpha(rank),
            target_modules=self._target_modules(list(chosen), model),
            fan_in_fan_out=any(_is_conv1d(module) for module in chosen.values()),
            tensors=module_tensors(
                method,
                self._sides(chosen, model),
                rank,
                [path for path, module in chosen.items() if _is_embedding(module)],
            ),
        )
        if _fused_experts(model) and method != "ffa":
            _check_in_peft(model, spec)
        return spec

    def _prefix(self, config: Any, model: Any, head: str | None, context: PassContext) -> AdapterSpec:
        from qpa.adapters.attach import prefix_config

        n_tokens = self.rank or DEFAULT_RANK["prefix"]
        _check_prefix(model, n_tokens)
        peft_config = prefix_config(model, n_tokens)
        return AdapterSpec(
            provenance=context.provenance(self, None),
            base=self._reference(config, model, head),
            method="prefix",
            rank=n_tokens,
            alpha=float(n_tokens),
            target_modules=(),
            fan_in_fan_out=False,
            tensors=prefix_tensors(peft_config.num_layers, peft_config.token_dim, n_tokens),
        )

    def _sides(self, chosen: dict[str, Any], model: Any) -> dict[str, tuple[int, int]]:
        """Return what goes into each module and comes out; a block is as wide as the model."""
        width = int(model.config.get_text_config().hidden_size)
        sides = {path: _in_out(module, width) for path, module in chosen.items()}
        if self.method == "ffa":  # what it gets is what the module returns
            return {path: (n_out, n_out) for path, (_, n_out) in sides.items()}
        return sides

    def _target_modules(self, chosen: list[str], model: Any) -> tuple[str, ...]:
        """Return the shortest names; IA3's for inputs and for outputs are told apart."""
        paths = [name for name, _ in model.named_modules()] + list(expert_sides(model))
        if self.method != "ia3":
            return _shortest_names(chosen, paths)
        inputs = [path for path in chosen if scales_inputs(path)]
        outputs = [path for path in chosen if path not in inputs]
        return _shortest_names(outputs, paths) + _shortest_names(inputs, paths)

    def _alpha(self, rank: int) -> float:
        if self.method not in ("lora", "dora"):
            return float(rank)
        return float(2 * rank if self.alpha is None else self.alpha)

    def _check_options(self) -> None:
        if self.method not in METHODS:
            raise OptionError("--method", one_of(METHODS), self.method)
        if self.targets is not None and not self.targets:
            raise OptionError("--targets", f"{ALL_LINEAR} or module names", "none")
        if self.rank is not None and self.rank < 1:
            raise OptionError("--rank", "a whole number of at least 1", str(self.rank))
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise OptionError("--alpha", "a finite number above 0", str(self.alpha))
        unused: dict[str, object] = {}
        unused |= {"--alpha": self.alpha} if self.method not in ("lora", "dora") else {}
        unused |= {"--rank": self.rank} if self.method == "ia3" else {}
        unused |= {"--targets": ",".join(self.targets or ()) or None} if self.method == "prefix" else {}
        for option, value in unused.items():
            if value is not None:
                expected = f"no such option with --method {self.method}"
                raise OptionError(option, expected, str(value), "leave it out")

    def _rank(self, chosen: dict[str, Any]) -> int:
        if self.method not in ("lora", "dora"):
            return self.rank or DEFAULT_RANK[self.method]
        smallest, path = min((min(_in_out(module)), path) for path, module in chosen.items())
        if self.rank is not None and self.rank > smallest:
            raise OptionError("--rank", f"at most {smallest}, the smaller side of {path}", str(self.rank))
        return min(DEFAULT_RANK[self.method], smallest) if self.rank is None else self.rank

    def _choose(self, model: Any, head: str | None) -> dict[str, Any]:
        """Return the modules to adapt, by path.

        Raises:  OptionError, ModelError: as `run`.
        """
        linears = _linears(model, head)
        known = linears if self.method != "ffa" else _blocks(model)
        if self.method == "lora":
            known = {**_input_embedding(model), **linears, **expert_sides(model)}
        targets = self.targets or self._default_targets(known)
        self._check_targets(targets, model, known, head)
        everything = ALL_LINEAR in targets
        chosen = {
            path: module
            for path, module in known.items()
            if (everything and path != head and not _is_embedding(module)) or _matches(path, targets)
        }
        if not chosen:
            raise ModelError(self.model, "at least one linear layer to adapt", "none")
        return chosen

    def _default_targets(self, known: dict[str, Any]) -> tuple[str, ...]:
        if self.method == "ia3":
            found = [name for name in IA3_TARGETS if any(_matches(path, (name,)) for path in known)]
        elif self.method == "ffa":
            found = [n for n in FEED_FORWARD_BLOCKS if any(_matches(path, (n,)) for path in known)][:1]
        else:
            found = [ALL_LINEAR]
        if not found:
            names = ", ".join(IA3_TARGETS if self.method == "ia3" else FEED_FORWARD_BLOCKS)
            raise OptionError("--targets", f"a model with {names}", "none of them", "name what to adapt")
        return tuple(found)

    def _check_targets(
        self, targets: tuple[str, ...], model: Any, known: dict[str, Any], head: str | None
    ) -> None:
        for target in targets:
            if target == ALL_LINEAR and self.method == "ffa":
                raise OptionError("--targets", "names of blocks with --method ffa", ALL_LINEAR)
            if target != ALL_LINEAR:
                kind = "linear layers" if self.method != "ffa" else "blocks with linear layers in the layers"
                _check_target(target, known, model, kind)
        fused = _fused_experts(model)
        if ALL_LINEAR in targets and fused and not has_experts(known):
            names = sorted({path.rpartition(".")[2] for path in known if path != head})
            raise OptionError(
                f"--targets {ALL_LINEAR}",
                "a model whose layers are all linear modules",
                f"fused experts such as {fused[0]}, which would stay as they are",
                "if that is meant, name the layers to adapt, of " + ", ".join(names[:12]),
            )

    def _reference(self, config: Any, model: Any, head: str | None) -> BaseModelReference:
        return BaseModelReference(
            name_or_path=self.model,
            local=Path(self.model).is_dir(),
            revision=self.revision,
            config_digest=config_file_digest(self.model, revision=self.revision),
            model_type=config.model_type,
            architecture=type(model).__name__,
            head=head,
            ties_lm_head=_ties_head(model),
            trust_remote_code=self.trust_remote_code,
        )


def _linears(model: Any, head: str | None) -> dict[str, Any]:
    """Return the linear layers of the language model, by path."""
    inside = _language_model_path(model)
    return {
        path: module
        for path, module in model.named_modules()
        if _is_linear(module) and (path == head or path.startswith(inside))
    }


def _language_model_path(model: Any) -> str:
    """Return how the paths inside the language model start, "" where it is the whole model."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    path = next((path for path, module in model.named_modules() if module is decoder), "")
    return f"{path}." if path else ""


def _blocks(model: Any) -> dict[str, Any]:
    """Return the modules of the language model's layers that have linear layers or are one, by path."""
    inside = _language_model_path(model)
    return {
        path: module
        for path, module in model.named_modules()
        if path.startswith(inside) and any(part.isdecimal() for part in path.split(".")[:-1])
        if any(_is_linear(part) for part in module.modules()) or any(p.ndim == 3 for p in module.parameters())
    }


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or _is_conv1d(module)


def _check_prefix(model: Any, n_tokens: int) -> None:
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and n_tokens >= limit:
        expected = f"fewer tokens than the base model's context of {limit}"
        raise OptionError("--rank", expected, str(n_tokens))
    kinds = {*(getattr(config, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}
    if kinds:
        expected, found = "layers with keys and values for a prefix", ", ".join(sorted(map(str, kinds)))
        raise ModelError(type(model).__name__, expected, found, "use another --method")


def _is_embedding(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Embedding)


def _input_embedding(model: Any) -> dict[str, Any]:
    """Return the embedding of the tokens, by its path."""
    embedding = model.get_input_embeddings()
    path = next((path for path, module in model.named_modules() if module is embedding), None)
    return {path: embedding} if path is not None and _is_embedding(embedding) else {}


def _is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _in_out(module: Any, width: int = 0) -> tuple[int, int]:
    """Return (in_features, out_features), as which experts' layers come; Conv1D's weight is [in, out].

    Args:    width: of a block, which is as wide as the model.
    """
    if isinstance(module, tuple):
        return module
    if _is_embedding(module):
        return module.num_embeddings, module.embedding_dim
    if not _is_linear(module):
        return width, width
    n_first, n_second = module.weight.shape
    return (n_first, n_second) if _is_conv1d(module) else (n_second, n_first)


def _head_path(model: Any) -> str | None:
    head = model.get_output_embeddings()
    if head is None:
        return None
    return next((path for path, module in model.named_modules() if module is head), None)


def _ties_head(model: Any) -> bool:
    """Return whether the head's weight is another module's too, on meta as after loading."""
    weight = getattr(model.get_output_embeddings(), "weight", None)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    owners = [path for path, value in model.named_parameters(remove_duplicate=False) if value is weight]
    return len(owners) > 1 or any(path in tied for path in owners)


def _fused_experts(model: Any) -> list[str]:
    """Return the 3-D parameters [n_experts, out, in] that mixtures of experts hold instead of modules."""
    return [path for path, value in model.named_parameters() if value.ndim == 3 and "expert" in path]


def _matches(path: str, targets: tuple[str, ...]) -> bool:
    return any(path == target or path.endswith("." + target) for target in targets)


def _check_target(target: str, known: dict[str, Any], model: Any, kind: str) -> None:
    """Check that a name is of modules that can be adapted, which are of some kind."""
    if any(_matches(path, (target,)) for path in known):
        return
    matched = [module for path, module in model.named_modules() if _matches(path, (target,))]
    expected = f"names of {kind}" if matched else "names that match modules"
    names = sorted({path.rpartition(".")[2] for path in known if not _is_embedding(known[path])})
    raise OptionError("--targets", expected, f"{target}, {_what_matched(matched)}", _nearest(target, names))


def _what_matched(modules: list[Any]) -> str:
    """Return what modules are that are no linear layers of the language model."""
    if not modules:
        return "which matches none"
    if any(_is_embedding(module) for module in modules):
        return "which is none but an embedding; LoRA alone adapts one, that of the tokens"
    if any(_is_linear(module) for module in modules):
        return "which is none of those of the language model"
    return "which is none"


def _check_in_peft(model: Any, spec: AdapterSpec) -> None:
    """Check that PEFT adapts the modules of a spec, on a model that is on the meta device.

    PEFT takes some names for the experts, whatever else has them, in models whose experts are fused. It
    reads gate_proj and up_proj of experts only beside down_proj.
    """
    import torch

    from qpa.adapters.attach import adapter_parameters, wrap_model

    names = {path.rpartition(".")[2] for path in _linears(model, None) if path != spec.base.head}
    outside = sorted(names - {*EXPERT_LAYERS})
    refused = OptionError(
        "--targets",
        "layers that PEFT adapts one by one, or all layers of all experts where it can",
        ", ".join(spec.target_modules) + ", of which some are of fused experts",
        f"name all of {', '.join(EXPERT_LAYERS)}, or only layers outside the experts: {', '.join(outside)}",
    )
    modules = {tensor.module for tensor in spec.tensors}
    if not {needs_down(module) for module in modules} <= {None, *modules}:
        raise refused
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter_parameters(wrap_model(model, spec), spec)
    except (ModelError, ValueError) as error:
        raise refused from error


def _nearest(target: str, names: list[str]) -> str:
    close = difflib.get_close_matches(target, names, n=3, cutoff=0.3)
    return "the nearest names are " + ", ".join(close or names[:8])


def _shortest_names(chosen: list[str], paths: list[str]) -> tuple[str, ...]:
    selected: list[str] = []
    for module_type in dict.fromkeys(path.rpartition(".")[2] for path in chosen):
        same_type = [path for path in chosen if path.rpartition(".")[2] == module_type]
        matched = [path for path in paths if _matches(path, (module_type,))]
        selected.extend([module_type] if matched == same_type else same_type)
    return tuple(selected)
