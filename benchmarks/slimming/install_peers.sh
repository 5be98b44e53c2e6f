#!/bin/sh
# Two virtual environments with the peers: DIR/gptqmodel and DIR/llmcompressor.
# An environment that is complete is left as it is.
#
#     sh benchmarks/slimming/install_peers.sh DIR
set -eu

if [ $# -ne 1 ]; then
    echo "usage: install_peers.sh DIR" >&2
    exit 2
fi
dir=$1
python=${PYTHON:-python3.11}

# The same torch as in constraints.txt for all: a build for the processor where the index has one.
torch="torch==2.13.0"

# GPTQModel declares torch >= 2.14.1, and a compiler of Rust that it does not need to run: hence
# without dependencies, and these by hand.
gptqmodel="GPTQModel==7.7.0"
gptqmodel_needs="transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 defuser==0.0.28
    device-smi==0.5.7 dill==0.4.1 jinja2==3.1.6 logbar==0.4.15 ninja==1.13.2 numpy==2.4.6
    packaging==26.4 pillow==13.0.0 protobuf==7.36.2 pyarrow==26.0.1 pypcre==0.6.4 requests==2.34.2
    safetensors==0.8.0 setuptools==84.2.1 threadpoolctl==3.8.0 tokenicer==0.0.14 torchao==0.18.0
    wheel==0.48.0"
llmcompressor="llmcompressor==0.14.0.1 compressed-tensors==0.19.0 transformers==5.17.0
    accelerate==1.15.0 datasets==5.2.0 numpy==2.4.6 safetensors==0.8.0"

# complete NAME WANTED: whether an environment was made to the end with just this.
complete() {
    [ -f "$dir/$1/.complete" ] && [ "$(cat "$dir/$1/.complete")" = "$2" ]
}

# The lists are words, so their variables stand without quotes.
wanted="$torch $gptqmodel $gptqmodel_needs"
if ! complete gptqmodel "$wanted"; then
    "$python" -m venv "$dir/gptqmodel"
    "$dir/gptqmodel/bin/pip" install $torch
    "$dir/gptqmodel/bin/pip" install $torch $gptqmodel_needs
    "$dir/gptqmodel/bin/pip" install --no-deps --no-build-isolation $gptqmodel
    "$dir/gptqmodel/bin/python" -c "import gptqmodel"
    printf '%s\n' "$wanted" > "$dir/gptqmodel/.complete"
fi

wanted="$torch $llmcompressor"
if ! complete llmcompressor "$wanted"; then
    "$python" -m venv "$dir/llmcompressor"
    "$dir/llmcompressor/bin/pip" install $torch
    "$dir/llmcompressor/bin/pip" install $torch $llmcompressor
    "$dir/llmcompressor/bin/python" -c "import llmcompressor"
    printf '%s\n' "$wanted" > "$dir/llmcompressor/.complete"
fi
echo "both are in $dir"
