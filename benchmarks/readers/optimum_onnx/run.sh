#!/bin/sh
# Run an ONNX folder in optimum-onnx, which needs transformers 4, and compare.
#
#   benchmarks/readers/optimum_onnx/run.sh ENVIRONMENT FOLDER
#
# ENVIRONMENT is a folder for a virtual environment of its own; it is made if it is not there. Set
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu where PyPI would bring the CUDA build of
# torch. moe2edge is run by the `python` on the path. PYTHON chooses the interpreter.
set -eu

if [ $# -ne 2 ]; then
    echo "usage: $0 ENVIRONMENT FOLDER" >&2
    exit 2
fi
environment=$1
folder=$2
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -e "$environment/complete" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet transformers==4.57.6 optimum==2.1.0 \
        optimum-onnx==0.1.0 onnx==1.23.2 onnxruntime==1.31.1 torch==2.13.0 >&2
    touch "$environment/complete"
fi

python "$here/continue.py" "$folder" > "$work/tokens.json"
exec "$environment/bin/python" "$here/read.py" "$folder" "$work/tokens.json"
