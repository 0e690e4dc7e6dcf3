"""Exported adapters in vLLM, outside the ordinary test run: `make test-vllm`."""
