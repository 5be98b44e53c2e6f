#!/usr/bin/env bash
# Read a GPTQ folder of moe2edge with GPTQModel, a reader that we did not write, on the CPU.
#
#     benchmarks/gptq_reader/run.sh FOLDER ENVIRONMENT
#
# ENVIRONMENT is made if it is not there. GPTQModel declares torch 2.14.1 or newer, but its CPU
# kernels run with 2.13, so it is installed without its dependencies, into an environment of its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
folder=$1
venv=$2
if [ ! -x "$venv/bin/python" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet -c "$root/constraints.txt" -e "$root" setuptools wheel
  "$venv/bin/pip" install --quiet accelerate datasets dill pypcre logbar device-smi tokenicer \
    defuser ninja pillow requests threadpoolctl torchao -c "$root/constraints.txt"
  "$venv/bin/pip" install --quiet --no-deps --no-build-isolation gptqmodel==7.7.0
fi
"$venv/bin/python" "$here/read.py" "$folder"
