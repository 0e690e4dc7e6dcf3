"""From a compact adapter and its basis to a plain LoRA, with numpy and safetensors alone."""

from qpa.serve.loading import load

__all__ = ["load"]
