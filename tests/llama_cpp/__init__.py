"""Exported adapters in llama.cpp, outside the ordinary test run: `make test-llama-cpp`."""
