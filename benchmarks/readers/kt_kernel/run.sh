#!/bin/sh
# Run the MoE layers of a GPTQ folder in kt-kernel, and compare.
#
#   benchmarks/readers/kt_kernel/run.sh ENVIRONMENT FOLDER
#
# ENVIRONMENT is a folder for a virtual environment of its own; it is made if it is not there. Set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where PyPI would bring the CUDA build of
# torch. PYTHON chooses the interpreter.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 ENVIRONMENT FOLDER" >&2
    exit 2
fi
environment=$1
folder=$2
here=$(cd "$(dirname "$0")" && pwd)

if [ ! -e "$environment/complete" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    # It declares packages for GPUs that its CPU kernels do without.
    "$environment/bin/python" -m pip install --quiet \
        torch==2.13.0 safetensors numpy pyyaml psutil packaging >&2
    "$environment/bin/python" -m pip install --quiet --no-deps kt-kernel==0.7.2 >&2
    touch "$environment/complete"
fi

exec "$environment/bin/python" "$here/read.py" "$folder"
