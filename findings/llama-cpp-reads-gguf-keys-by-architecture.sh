#!/bin/sh
# llama.cpp: whether a key of a GGUF file counts depends on the architecture, and nothing tells.
#
# The gguf package defines keys for any architecture: expert_weights_scale, expert_weights_norm,
# attention.clamp_kqv, rope.scaling.yarn_beta_fast and _slow. One would expect that they are followed
# wherever the model has the step that they change. Seen with xllamacpp 2026.10.11549 and gguf 0.19.0,
# on random models, by logits with and without the key (no warning in the log names one):
#
#   expert_weights_scale  followed in glm4moe,  ignored in lfm2moe, qwen3moe, olmoe
#   expert_weights_norm   followed in glm4moe,  ignored in lfm2moe, qwen3moe, olmoe
#   attention.clamp_kqv   followed in olmo,     ignored in olmoe
#   yarn_beta_fast, _slow followed in mistral3, ignored in the five others, which follow yarn itself
#
# In transformers LFM2-MoE has the scale (routed_scaling_factor), and OLMoE the clamp (clip_qkv). So a
# file that holds all that a config says may still be another model.
set -eu
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet xllamacpp==2026.10.11549 gguf==0.19.0
"$place/venv/bin/python" - "$place/model.gguf" <<'P'
import ctypes
import glob
import importlib.util
import sys
from importlib.metadata import version

import numpy as np
from gguf import GGUFWriter

VOCABULARY, WIDTH, HEADS, EXPERTS, LAYERS = 64, 64, 4, 8, 2
PLAIN = ("olmo", "mistral3")
path = sys.argv[1]


# ---- llama.cpp, with its default parameters ----


class Parameters(ctypes.Structure):
    """Filled in by the library, and handed back as they are; with room to spare."""

    _fields_ = [("room", ctypes.c_ubyte * 512)]


class Batch(ctypes.Structure):
    _fields_ = [("count", ctypes.c_int32), ("arrays", ctypes.c_void_p * 6)]


Pointer, Ids = ctypes.c_void_p, ctypes.POINTER(ctypes.c_int32)
Log = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, Pointer)
FUNCTIONS = {
    "log_set": (None, [Log, Pointer]),
    "backend_init": (None, []),
    "model_default_params": (Parameters, []),
    "context_default_params": (Parameters, []),
    "model_load_from_file": (Pointer, [ctypes.c_char_p, Parameters]),
    "init_from_model": (Pointer, [Pointer, Parameters]),
    "batch_get_one": (Batch, [Ids, ctypes.c_int32]),
    "decode": (ctypes.c_int32, [Pointer, Batch]),
    "get_logits_ith": (ctypes.POINTER(ctypes.c_float), [Pointer, ctypes.c_int32]),
    "free": (None, [Pointer]),
    "model_free": (None, [Pointer]),
}
(package,) = importlib.util.find_spec("xllamacpp").submodule_search_locations
library = ctypes.CDLL(glob.glob(f"{package}/xllamacpp*.so")[0])
call = {}
for name, (result, arguments) in FUNCTIONS.items():
    call[name] = getattr(library, f"llama_{name}")
    call[name].restype, call[name].argtypes = result, arguments
warnings = []
hear = Log(lambda level, text, _: warnings.append(text.decode()) if level in (3, 4) else None)
call["log_set"](hear, None)
call["backend_init"]()


# ---- files ----


def write(architecture, keys):
    """Write a random model, the same one at each call but for the keys."""
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, architecture)
    short = architecture == "lfm2moe"
    scored = architecture in ("lfm2moe", "glm4moe")
    size = WIDTH // HEADS
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv([0, HEADS] if short else HEADS)
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("none")
    if architecture not in PLAIN:
        writer.add_expert_count(EXPERTS)
        writer.add_expert_used_count(2)
        writer.add_expert_feed_forward_length(WIDTH)
    if scored:
        writer.add_leading_dense_block_count(0)
        writer.add_uint32(f"{architecture}.expert_gating_func", 2)  # sigmoid
    if architecture == "glm4moe":
        writer.add_expert_shared_count(1)
    if short:
        writer.add_shortconv_l_cache(3)
    for key, value in keys.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add[type(value)](f"{architecture}.{key}", value)

    def put(name, *shape):
        middle, spread = (1, 0.1) if "norm" in name else (0, 0.01 if "bias" in name else 0.3)
        writer.add_tensor(name, (middle + spread * random.standard_normal(shape)).astype(np.float32))

    put("token_embd.weight", VOCABULARY, WIDTH)
    if short:
        put("token_embd_norm.weight", WIDTH)
    else:
        put("output.weight", VOCABULARY, WIDTH)
        if architecture != "olmo":
            put("output_norm.weight", WIDTH)
    for block in (f"blk.{number}" for number in range(LAYERS)):
        if architecture != "olmo":
            put(f"{block}.attn_norm.weight", WIDTH)
            second = "post_attention_norm" if architecture == "glm4moe" else "ffn_norm"
            put(f"{block}.{second}.weight", WIDTH)
        if short and block == "blk.0":
            put(f"{block}.shortconv.in_proj.weight", 3 * WIDTH, WIDTH)
            put(f"{block}.shortconv.conv.weight", WIDTH, 3)
            put(f"{block}.shortconv.out_proj.weight", WIDTH, WIDTH)
        else:
            for part in ("q", "k", "v", "output"):
                put(f"{block}.attn_{part}.weight", WIDTH, WIDTH)
            for part in "qk" if architecture in ("olmoe", "qwen3moe", "lfm2moe") else "":
                put(f"{block}.attn_{part}_norm.weight", WIDTH if architecture == "olmoe" else size)
        for part in ("gate", "up", "down"):
            if architecture in PLAIN:
                put(f"{block}.ffn_{part}.weight", WIDTH, WIDTH)
            else:
                put(f"{block}.ffn_{part}_exps.weight", EXPERTS, WIDTH, WIDTH)
            if architecture == "glm4moe":
                put(f"{block}.ffn_{part}_shexp.weight", WIDTH, WIDTH)
        if architecture not in PLAIN:
            put(f"{block}.ffn_gate_inp.weight", EXPERTS, WIDTH)
        if scored:
            put(f"{block}.exp_probs_b.bias", EXPERTS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(architecture, keys):
    """Return the logits after the last of 48 tokens."""
    write(architecture, keys)
    warnings.clear()
    model = call["model_load_from_file"](path.encode(), call["model_default_params"]())
    assert model, warnings
    context = call["init_from_model"](model, call["context_default_params"]())
    ids = (ctypes.c_int32 * 48)(*range(48))
    assert call["decode"](context, call["batch_get_one"](ids, len(ids))) == 0
    logits = np.ctypeslib.as_array(call["get_logits_ith"](context, -1), (VOCABULARY,)).copy()
    call["free"](context)
    call["model_free"](model)
    return logits


# ---- with and without ----

YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64}
TRIED = {
    "expert_weights_scale": ({}, {"expert_weights_scale": 2.5}),
    "expert_weights_norm, yes or no": ({"expert_weights_norm": False}, {"expert_weights_norm": True}),
    "attention.clamp_kqv": ({}, {"attention.clamp_kqv": 0.5}),
    "yarn": ({}, YARN),
    "yarn_beta_fast, _slow": (
        YARN, {**YARN, "rope.scaling.yarn_beta_fast": 2.0, "rope.scaling.yarn_beta_slow": 0.02}
    ),
}
FOLLOWED = {
    "expert_weights_scale": {"glm4moe"}, "expert_weights_norm, yes or no": {"glm4moe"},
    "attention.clamp_kqv": {"olmo"}, "yarn_beta_fast, _slow": {"mistral3"},
    "yarn": {"olmo", "mistral3", "olmoe", "qwen3moe", "lfm2moe", "glm4moe"},
}
print("xllamacpp", version("xllamacpp"), "gguf", version("gguf"))
found = {name: set() for name in TRIED}
warned = []
for architecture in ("olmo", "mistral3", "olmoe", "qwen3moe", "lfm2moe", "glm4moe"):
    routed = architecture not in PLAIN
    assert np.array_equal(run(architecture, {}), run(architecture, {}))
    for name, (first, second) in TRIED.items():
        if name.startswith("expert") and not routed:
            continue
        before, after = run(architecture, first), run(architecture, second)
        warned += [line for line in warnings if any(key.rpartition(".")[2] in line for key in second)]
        change = np.linalg.norm(after - before) / np.linalg.norm(before)
        if change:
            found[name].add(architecture)
        print(f"  {architecture}, {name}: logits change by {change:.1%}")
print("  warnings that name a key:", warned)
sys.exit(found != FOLLOWED or bool(warned))
P
