"""vLLM asks for a model that it does not know: the adapter of that name is expanded and handed over.

vLLM loads this file by the entry point `vllm.general_plugins`, in every one of its processes. What is found
where is said by environment variables, see `qpa.serve.resolution`.

Rules:
1. A name that the store does not have, or that is no name, is left to other resolvers: HTTP 404.
2. What goes wrong with one adapter is one line in vLLM's log, and a 404 too: the server goes on.
3. Where vLLM names its base model otherwise than the basis, a line in the log says so once: it may be the
   same in another place.
4. vLLM keeps for each name what it was answered, and reads the directory again whenever the adapter has left
   its memory. So a worker first makes the directory again where the cache has dropped it.

Source: vLLM's design document of LoRA resolver plugins; written for vLLM 0.32.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import logging
import os
from pathlib import Path
from typing import Any

from vllm.lora import worker_manager
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from qpa.errors import QpaError
from qpa.serve.cache import Expanded
from qpa.serve.resolution import Adapters

NAME = "qpa"

_LOG = logging.getLogger("vllm.qpa")


class QpaResolver(LoRAResolver):  # type: ignore[misc]
    """Finds adapters in a store."""

    def __init__(self, adapters: Adapters) -> None:
        self.adapters = adapters
        self._warned_of: str | None = None

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """Return the request of an adapter, whose directory is there; None where there is none."""
        try:
            found = await asyncio.to_thread(self.adapters.expanded, lora_name)
        except (QpaError, OSError) as error:
            _LOG.error("adapter %s cannot be expanded: %s", lora_name, error)
            return None
        if found is None:
            return None
        self._compare(base_model_name)
        return LoRARequest(
            lora_name=lora_name, lora_int_id=_number_of(lora_name, found), lora_path=str(found.path)
        )

    def _compare(self, served: str) -> None:
        base = self.adapters.base
        if base != served != self._warned_of:
            self._warned_of = served
            _LOG.warning("vLLM serves %s, and the basis is of %s: are their weights the same?", served, base)


def register() -> None:
    """Register the resolver, where QPA_STORE is set; once in a process.

    Raises:  OptionError: another variable is missing or wrong.
    """
    adapters = Adapters.from_environment(os.environ)
    if adapters is None or NAME in LoRAResolverRegistry.get_supported_resolvers():
        return
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "0").strip().lower() not in ("1", "true"):
        _LOG.warning("QPA_STORE is set, but VLLM_ALLOW_RUNTIME_LORA_UPDATING is not: no adapter is looked up")
    LoRAResolverRegistry.register_resolver(NAME, QpaResolver(adapters))
    _keep_directories_there(adapters)


def _number_of(name: str, found: Expanded) -> int:
    """Return a number from 1 to 2**63 - 1 that belongs to a name and a file, in every process.

    The server of vLLM 0.32 puts one of its own in its place.
    """
    digest = hashlib.sha256(f"{name} {found.digest}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 1) or 1


def _keep_directories_there(adapters: Adapters) -> None:
    """Let this process make an adapter's directory again before vLLM reads it."""
    find = getattr(worker_manager, "get_adapter_absolute_path", None)
    if find is None:
        _LOG.warning(
            "this vLLM loads adapters in another way than 0.32: let QPA_CACHE_BYTES be enough for all"
        )
        return

    @functools.wraps(find)
    def find_there(lora_path: str) -> Any:
        try:
            adapters.again(Path(lora_path))
        except (QpaError, OSError) as error:
            _LOG.error("%s cannot be expanded again: %s", lora_path, error)
        except Exception:
            # Whatever it is, the directory may still be there, and all requests would end with this process.
            _LOG.exception("%s cannot be expanded again", lora_path)
        return find(lora_path)

    worker_manager.get_adapter_absolute_path = find_there
