#!/bin/sh
# Run an ONNX folder in onnxruntime-genai, which reads genai_config.json, and compare.
#
#   benchmarks/readers/onnxruntime_genai/run.sh ENVIRONMENT FOLDER
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
root=$(cd "$here/../../.." && pwd)

if [ ! -e "$environment/complete" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet -c "$root/constraints.txt" \
        onnxruntime-genai==0.18.0 "$root[cpu]" >&2
    touch "$environment/complete"
fi

exec "$environment/bin/python" "$here/read.py" "$folder"
