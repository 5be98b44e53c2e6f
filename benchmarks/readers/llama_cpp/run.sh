#!/usr/bin/env bash
# Make an environment with gguf and xllamacpp, and read a GGUF folder in it.
#
#   benchmarks/readers/llama_cpp/run.sh ENVIRONMENT FOLDER
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
if [ ! -d "$1" ]; then
    python3 -m venv "$1"
    "$1/bin/pip" install --quiet -c "$root/constraints.txt" -e "$root[cpu,gguf]"
fi
"$1/bin/python" "$root/benchmarks/readers/llama_cpp/read.py" "$2"
