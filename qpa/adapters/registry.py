"""The kinds of adapters, by name. A kind's file is loaded when the kind is asked for."""

from __future__ import annotations

from qpa.adapters.kind import AdapterKind
from qpa.documents import TENSOR_RULES
from qpa.registry import Registry


class KindRegistry(Registry[AdapterKind]):
    """Find kinds of adapters by name; a kind from outside brings the rules of its tensors for documents."""

    def add(self, name: str, thing: AdapterKind) -> None:
        """Add a kind from outside.

        Raises:  OptionError: its name is taken, or the name of one of its roles with another meaning.
        """
        TENSOR_RULES.add(name, thing.rules)
        super().add(name, thing)

    def remove(self, name: str) -> None:
        """Remove a kind that `add` added."""
        super().remove(name)
        TENSOR_RULES.remove(name)


KINDS = KindRegistry(
    "method",
    {
        "lora": "qpa.adapters.lora:KIND",
        "dora": "qpa.adapters.dora:KIND",
        "ia3": "qpa.adapters.ia3:KIND",
        "prefix": "qpa.adapters.prefix:KIND",
        "ffa": "qpa.adapters.feed_forward:KIND",
        "cayley": "qpa.adapters.cayley:KIND",
        "cayley-shared": "qpa.adapters.cayley:SHARED",
        "qtha": "qpa.adapters.qtha:KIND",
    },
)

DEFAULT = "lora"
"""The kind where none is asked for."""
