"""From a compact adapter and its basis to a plain LoRA, with numpy and safetensors alone."""
