"""``genai_config.json``, with which onnxruntime-genai runs the graph."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from moe2edge.model.family import find_family

GENAI_CONFIG = "genai_config.json"
# onnxruntime-genai reserves a cache of this many tokens unless the user sets max_length.
DEFAULT_LENGTH = 4096


def build_genai_config(config: Mapping[str, Any], ends: Collection[int]) -> dict[str, Any]:
    """Build ``genai_config.json`` for onnxruntime-genai, whose type "decoder" runs any such graph.

    Args:
        config: ``config.json`` of the graph.
        ends: ids of tokens, any of which ends a text.
    """
    geometry = find_family(config).geometry(config)
    ids: dict[str, Any] = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    if ends:
        ids["eos_token_id"] = min(ends) if len(ends) == 1 else sorted(ends)
        pad = ids["pad_token_id"]
        if pad is None or not 0 <= pad < geometry.vocab:
            ids["pad_token_id"] = min(ends)
    past, present = "past_key_values.%d", "present.%d"
    return {
        "model": {
            "type": "decoder",
            "vocab_size": geometry.vocab,
            "context_length": geometry.max_positions,
            **{key: value for key, value in ids.items() if value is not None},
            "decoder": {
                "filename": "model.onnx",
                "head_size": geometry.head_dim,
                "hidden_size": geometry.hidden,
                "num_attention_heads": geometry.heads,
                "num_key_value_heads": geometry.kv_heads,
                "num_hidden_layers": config["num_hidden_layers"],
                # Not the number of threads, which depends on the machine that runs the graph.
                "session_options": {
                    "provider_options": [],
                    "session.intra_op.allow_spinning": "1",
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": f"{past}.key",
                    "past_value_names": f"{past}.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{present}.key",
                    "present_value_names": f"{present}.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": min(geometry.max_positions, DEFAULT_LENGTH),
            "past_present_share_buffer": True,
        },
    }
