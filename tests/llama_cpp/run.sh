#!/bin/sh
# Check exported adapters in llama.cpp, which gets an environment of its own, built from source once.
# It needs a C++ compiler. The source also holds llama.cpp's converters, which no package has.
set -eu
cd "$(dirname "$0")/../.."

environment=.venv-llama-cpp
constraints=tests/llama_cpp/constraints.txt
package=$(grep '^llama-cpp-python==' "$constraints")

if ! cmp -s "$constraints" "$environment/complete"; then
    rm -rf "$environment"
    .venv/bin/python -m venv "$environment"
    echo '*' > "$environment/.gitignore"
    "$environment/bin/pip" download --quiet --no-deps --no-binary :all: --dest "$environment" "$package"
    mkdir "$environment/source"
    tar -xzf "$environment"/llama_cpp_python-*.tar.gz -C "$environment/source" --strip-components 1
    # The models are tiny, and the build is most of the time: only the library, hardly optimised.
    CMAKE_ARGS="-DLLAVA_BUILD=OFF -DCMAKE_C_FLAGS_RELEASE=-O1 -DCMAKE_CXX_FLAGS_RELEASE=-O1" \
        "$environment/bin/pip" install --quiet --constraint "$constraints" "./$environment/source" safetensors
    cp "$constraints" "$environment/complete"
fi

exec .venv/bin/python -m tests.llama_cpp.check "$environment"
