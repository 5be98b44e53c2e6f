#!/bin/sh
# Read folders of target hf with transformers 4.57.6, and compare with the release in use.
#
#   benchmarks/readers/transformers_4/run.sh ENVIRONMENT
#
# ENVIRONMENT is a folder for a virtual environment of its own; it is made if it is not there.
# moe2edge is run by the `python` on the path. PYTHON chooses the interpreter of the other one.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 ENVIRONMENT" >&2
    exit 2
fi
environment=$1
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

if [ ! -e "$environment/complete" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    "$environment/bin/python" -m pip install --quiet \
        transformers==4.57.6 torch==2.13.0 safetensors numpy >&2
    touch "$environment/complete"
fi

cd "$root"
python -m benchmarks.readers.transformers_4.make "$work" >&2
python "$here/read.py" "$work"
"$environment/bin/python" "$here/read.py" "$work"
