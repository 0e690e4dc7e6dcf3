"""How PEFT keeps a kind of adapter in a directory: adapter_config.json and adapter_model.safetensors.

A kind says here what is written for it and which content is right, so that the one cannot change without the
other. LoRA has a contract of its own for directories of every origin (`qpa.exporters.contracts.lora`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar

from qpa.compat.peft_ import KEY_PREFIX
from qpa.documents import AdapterSpec, FrozenAdapter
from qpa.documents.base import JsonObject
from qpa.documents.finding import Finding, several
from qpa.models.linear_layers import is_selected, selects

if TYPE_CHECKING:
    from qpa.adapters.frozen_arrays import FrozenArrays
    from qpa.store.tensor_file import Array, TensorFile

Fields = Mapping[str, Callable[[object], bool]]
"""For each field of adapter_config.json, a function that says whether the field may hold a value."""


class PeftDirectory(ABC):
    """What a directory of one kind of adapter holds.

    Class attributes:
             tag: the tag of the kind on the Hub.
             warning: words for the card on what engines do that do not serve such a directory.
             fields: all fields of adapter_config.json.
    """

    tag: ClassVar[str]
    warning: ClassVar[str] = ""
    fields: ClassVar[Fields]

    @abstractmethod
    def config(self, frozen: FrozenAdapter) -> JsonObject:
        """Return the content of adapter_config.json."""

    @abstractmethod
    def check(self, config: JsonObject, file: TensorFile) -> Iterator[Finding]:
        """Yield which tensors of a directory of any origin are not those of its config, rule L24.

        Args:    config: the config, whose `fields` are known to be right.
        """

    def refuse(self, frozen: FrozenAdapter) -> None:  # noqa: B027 - most kinds have nothing to refuse
        """Refuse an adapter that PEFT does not have although it has the kind.

        Raises:  ExportError: with the reason, and a format that carries it.
        """

    def shapes(self, frozen: FrozenAdapter) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor of the file, by its key."""
        return {KEY_PREFIX + tensor.path: tensor.shape for tensor in frozen.tensors}

    def read(self, arrays: FrozenArrays, key: str) -> Array:
        """Return a tensor of the file, in any shape of as many numbers."""
        return arrays.read(key.removeprefix(KEY_PREFIX))


def common_config(frozen: FrozenAdapter | AdapterSpec) -> JsonObject:
    """Return the fields of adapter_config.json that every kind has."""
    return {
        "base_model_name_or_path": frozen.base.name_or_path,
        "inference_mode": True,
        "revision": frozen.base.revision,
        "task_type": "CAUSAL_LM",
    }


def is_one_of(*values: object) -> Callable[[object], bool]:
    """Return a check that a value is one of these, and of the same type: 1 is not true."""
    return lambda value: any(
        value is wanted or (type(value), value) == (type(wanted), wanted) for wanted in values
    )


def is_count(value: object) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def are_names(value: object) -> bool:
    """Return whether a value is a list of names."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def are_targets(value: object) -> bool:
    """Return whether a value is a list of at least one name."""
    return are_names(value) and bool(value)


COMMON_FIELDS: Fields = {
    "base_model_name_or_path": lambda value: isinstance(value, str) and bool(value),
    "inference_mode": is_one_of(True),
    "revision": lambda value: value is None or isinstance(value, str),
    "task_type": is_one_of("CAUSAL_LM"),
}
MODULE_FIELDS: Fields = {
    **COMMON_FIELDS,
    "fan_in_fan_out": is_one_of(True, False),
    "target_modules": are_targets,
}
"""The fields that kinds on modules have."""


def check_names(
    found: Collection[str], wanted: Collection[str], modules: Collection[str], config: JsonObject
) -> Iterator[Finding]:
    """Yield keys that are missing or should not be there, and modules that target_modules does not select.

    Args:    modules: the modules that have tensors.
    """
    if others := sorted({*found} ^ {*wanted}) or ([] if modules else ["no tensor"]):
        yield Finding("L24", several(others), "the tensors of each module, and no others", "another set")
    targets = config["target_modules"]
    assert isinstance(targets, list)
    alone = sorted(module for module in modules if not is_selected(module, targets))
    unused = sorted(name for name in targets if not any(selects(name, module) for module in modules))
    if alone or unused:
        expected = "target_modules that select exactly the modules with tensors"
        yield Finding("L24", several(alone + unused), expected, "others")
