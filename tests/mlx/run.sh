#!/bin/sh
# Check exported adapters in mlx-lm, which gets an environment of its own: MLX for the CPU, made once.
set -eu
cd "$(dirname "$0")/../.."

environment=.venv-mlx
constraints=tests/mlx/constraints.txt

if ! cmp -s "$constraints" "$environment/complete"; then
    rm -rf "$environment"
    .venv/bin/python -m venv "$environment"
    "$environment/bin/pip" install --quiet --constraint "$constraints" 'mlx[cpu]' mlx-lm
    cp "$constraints" "$environment/complete"
fi

exec .venv/bin/python -m tests.conformance.run --engines mlx --mlx "$environment/bin/python" \
    --architectures llama,qwen3,gemma2 --formats mlx
