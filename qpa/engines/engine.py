"""What an engine is to verify-adapter: a record that says what is known of it, and the object that answers.

Source: ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Request = dict[str, Any]
"""What `qpa.engines.worker` is asked, as its docstring says."""


@dataclass(frozen=True, slots=True)
class NeededFile:
    """A file that an engine needs besides the export.

    Args:    option: the option of verify-adapter, and the field of the request, that names the file.
             expected: what the file is.
             example: a name for it.
             advice: how to make one.
    """

    option: str
    expected: str
    example: str
    advice: str


@dataclass(frozen=True, slots=True)
class EngineRecord:
    """What is known of an engine without starting it.

    Args:    name: as on the command line and in documents.
             package: the Python module that must be installed.
             file: path of the Python file with `open_engine(request)`, which returns an `Engine`. The worker
             runs it where nothing of qpa can be imported.
             own_environment: it is not installed beside qpa, so it wants a Python of its own.
             tolerance: for an engine whose arithmetic is coarser than float32, in units of
             max(1, largest |live logit|).
             needs: files besides the export.
             ranks: the largest ranks of a LoRA that it can be told to serve, its default first; () means
             that it serves any rank.
    """

    name: str
    package: str
    file: str
    own_environment: bool = False
    tolerance: float = 0.0
    needs: tuple[NeededFile, ...] = ()
    ranks: tuple[int, ...] = ()


class Engine(Protocol):
    """A model with the adapter, in an engine that serves it.

    Args:    missing_keys, unexpected_keys: what the engine wanted and did not find, and found and did not
             want; known at the latest after `greedy`.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]

    def logits(self, tokens: list[int]) -> npt.NDArray[np.float32] | None:
        """Return float32[n_tokens, n_vocabulary], or None where the engine does not give them."""
        ...

    def greedy(self, prompt: list[int], n_new: int) -> list[int]:
        """Return the greedy continuation of a prompt."""
        ...
