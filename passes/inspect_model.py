"""inspect-model: from a base model's config to the tensors of an adapter.

Rules:
1. Only the config is read; the model is built on the meta device.
2. "all-linear" is every Linear and Conv1D except the output head; names select by the last
   components of the module path, as PEFT does, and may select the head. Several targets add up.
   Fused experts (one 3-D parameter for all of a layer) are no linear layers: "all-linear" does not
   leave them out in silence but asks for names, and names that PEFT would take for the experts are
   refused. Of a model that also sees or hears, only the language model and the head are adapted.
3. target_modules of the result is the shortest list of names that selects exactly these modules in
   PEFT: module types where they are unambiguous, full paths where they are not.
4. lora_A is [rank, in_features], lora_B [out_features, rank], whatever way the base stores its weight.
"""

from __future__ import annotations

import difflib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from qpa.base_model import build_on_meta, config_file_digest, load_config
from qpa.documents import AdapterSpec, AdapterTensor, BaseModelReference, Document
from qpa.errors import ModelError, OptionError
from qpa.pipeline import PassContext

ALL_LINEAR = "all-linear"
DEFAULT_RANK = 32


@final
@dataclass(frozen=True, slots=True)
class InspectModel:
    """Find the modules to adapt and the shapes of their adapter.

    Args:    model: local directory or Hub id.
             rank: of LoRA; None means 32, or the smallest side of an adapted module where that is less.
             alpha: of LoRA; None means 2 * rank, as in arXiv 2410.09846.
             targets: "all-linear", module names, or both.
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
    targets: tuple[str, ...] = (ALL_LINEAR,)
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
        linears = _linears(model, head)
        self._check_targets(model, linears, head)
        chosen = self._choose(linears, head)
        rank = self._rank(chosen)
        spec = AdapterSpec(
            provenance=context.provenance(self, None),
            base=self._reference(config, model, head),
            method="lora",
            rank=rank,
            alpha=float(2 * rank if self.alpha is None else self.alpha),
            target_modules=_shortest_names(list(chosen), [name for name, _ in model.named_modules()]),
            fan_in_fan_out=any(_is_conv1d(module) for module in chosen.values()),
            tensors=tuple(t for path, module in chosen.items() for t in _tensors(path, module, rank)),
        )
        if _fused_experts(model):
            _check_in_peft(model, spec)
        return spec

    def _check_options(self) -> None:
        if self.method != "lora":
            raise OptionError("--method", "lora", self.method)
        if not self.targets:
            raise OptionError("--targets", f"{ALL_LINEAR} or module names", "none")
        if self.rank is not None and self.rank < 1:
            raise OptionError("--rank", "a whole number of at least 1", str(self.rank))
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise OptionError("--alpha", "a finite number above 0", str(self.alpha))

    def _rank(self, chosen: dict[str, Any]) -> int:
        smallest, path = min((min(_in_out(module)), path) for path, module in chosen.items())
        if self.rank is not None and self.rank > smallest:
            raise OptionError("--rank", f"at most {smallest}, the smaller side of {path}", str(self.rank))
        return min(DEFAULT_RANK, smallest) if self.rank is None else self.rank

    def _check_targets(self, model: Any, linears: dict[str, Any], head: str | None) -> None:
        for target in self.targets:
            if target != ALL_LINEAR:
                _check_target(target, linears, model)
        fused = _fused_experts(model)
        if ALL_LINEAR in self.targets and fused:
            names = sorted({path.rpartition(".")[2] for path in linears if path != head})
            raise OptionError(
                f"--targets {ALL_LINEAR}",
                "a model whose layers are all linear modules",
                f"fused experts such as {fused[0]}, which would stay as they are",
                "if that is meant, name the layers to adapt, of " + ", ".join(names[:12]),
            )

    def _choose(self, linears: dict[str, Any], head: str | None) -> dict[str, Any]:
        everything = ALL_LINEAR in self.targets
        chosen = {
            path: module
            for path, module in linears.items()
            if (everything and path != head) or _matches(path, self.targets)
        }
        if not chosen:
            raise ModelError(self.model, "at least one linear layer to adapt", "none")
        return chosen

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


def _is_linear(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Linear) or _is_conv1d(module)


def _is_conv1d(module: Any) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)


def _in_out(module: Any) -> tuple[int, int]:
    """Return (in_features, out_features); Conv1D stores its weight as [in, out]."""
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


def _check_target(target: str, linears: dict[str, Any], model: Any) -> None:
    if any(_matches(path, (target,)) for path in linears):
        return
    matched = [module for path, module in model.named_modules() if _matches(path, (target,))]
    expected = "names of linear layers" if matched else "names that match modules"
    names = sorted({path.rpartition(".")[2] for path in linears})
    raise OptionError("--targets", expected, f"{target}, {_what_matched(matched)}", _nearest(target, names))


def _what_matched(modules: list[Any]) -> str:
    """Return what modules are that are no linear layers of the language model."""
    import torch

    if not modules:
        return "which matches none"
    if any(isinstance(module, torch.nn.Embedding) for module in modules):
        return "which is none but an embedding, whose LoRA has other tensors (lora_embedding_A)"
    if any(_is_linear(module) for module in modules):
        return "which is none of the language model"
    return "which is none"


def _check_in_peft(model: Any, spec: AdapterSpec) -> None:
    """Check that PEFT adapts the modules of a spec, on a model that is on the meta device.

    PEFT takes some names for the experts, whatever else has them, in models whose experts are fused.
    """
    import torch

    from qpa.adapter import adapter_parameters, wrap_model

    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapter_parameters(wrap_model(model, spec), spec)
    except (ModelError, ValueError) as error:
        raise OptionError(
            "--targets",
            "layers that PEFT adapts one by one",
            ", ".join(spec.target_modules) + ", of which it takes some for fused experts",
            "leave out the names that experts have, such as gate_proj, up_proj and down_proj",
        ) from error


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


def _tensors(path: str, module: Any, rank: int) -> tuple[AdapterTensor, AdapterTensor]:
    n_in, n_out = _in_out(module)
    module_type = path.rpartition(".")[2]
    return (
        AdapterTensor(
            module=path, module_type=module_type, role="lora_A", shape=(rank, n_in), initial="kaiming_uniform"
        ),
        AdapterTensor(
            module=path, module_type=module_type, role="lora_B", shape=(n_out, rank), initial="zeros"
        ),
    )
