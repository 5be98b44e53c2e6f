#!/bin/sh
# Read a GPTQ folder with GPTQModel, which moe2edge's authors did not write, and compare.
#
#   benchmarks/readers/gptqmodel/run.sh ENVIRONMENT FOLDER
#
# ENVIRONMENT is a folder for a virtual environment of its own; it is made if it is not there.
# GPTQModel 7.7.0 declares torch>=2.14.1, and runs on a CPU with 2.13.0 as well; hence --no-deps
# and its other dependencies by name. Set PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# where PyPI would bring the CUDA build of torch. PYTHON chooses the interpreter.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 ENVIRONMENT FOLDER" >&2
    exit 2
fi
environment=$1
folder=$2
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)

if [ ! -e "$environment/complete" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet \
        torch==2.13.0 transformers==5.23.0 safetensors accelerate datasets pyarrow dill numpy \
        threadpoolctl pillow protobuf requests jinja2 ninja packaging filelock pydantic >&2
    "$environment/bin/python" -m pip install --quiet --no-deps \
        gptqmodel==7.7.0 pypcre logbar device-smi tokenicer defuser >&2
    touch "$environment/complete"
fi

# Compiling its kernels would need a C++ compiler, and takes longer than it saves.
TORCHDYNAMO_DISABLE=1 PYTHONPATH=$root exec "$environment/bin/python" "$here/read.py" "$folder"
