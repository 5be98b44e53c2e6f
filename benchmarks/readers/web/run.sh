#!/bin/sh
# Run web folders in what npm has: onnxruntime-web, onnxruntime-node and transformers.js, by Node.
#
#   benchmarks/readers/web/run.sh FOLDER > benchmarks/readers/web/output.txt
#
# FOLDER is for npm packages; they are installed if they are not there. moe2edge is run by the
# `python` on the path.
set -eu

if [ $# -ne 1 ]; then
    echo "usage: $0 FOLDER" >&2
    exit 2
fi
mkdir -p "$1"
folder=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
if [ ! -e "$folder/node_modules/@huggingface/transformers" ]; then
    # The binaries for a processor are in the package; its script fetches those for CUDA.
    ONNXRUNTIME_NODE_INSTALL=skip npm install --silent --prefix "$folder" \
        @huggingface/transformers@4.3.2 onnxruntime-node@1.30.0 onnxruntime-web@1.30.0 >&2
fi
MOE2EDGE_NODE_MODULES=$folder/node_modules python -W ignore "$here/read.py"
