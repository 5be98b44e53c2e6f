"""The table of the keys of ``config.json``: what transformers does with each.

A key is judged by what it does in the installed transformers, not by its presence:

- *read*: a setting of the row of the family table (`Family.reads`). All others are one of these:
- `INERT`: does nothing in inference, or is read from the tensors; it is kept.
- `RUN`: says how to run the model, not what it computes; moe2edge sets it itself.
- `FIXED`: changes the result, or which files are read; one of some values, or not supported.
- `OTHER_FAMILIES`: settings of related families that the classes here ignore.
- a name that no code reads: ignored, as by transformers, and kept.

`tests/test_config_keys.py` walks over all keys of transformers' config classes and over all names
that transformers reads of a config while it loads and runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

INERT = frozenset(
    {
        "architectures", "attention_dropout", "bos_token_id",
        "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range",
        "label2id", "model_type", "name_or_path", "num_labels", "pad_token_id", "problem_type",
        "router_aux_loss_coef", "router_jitter_noise", "torch_dtype", "transformers_version",
        "_commit_hash", "_name_or_path",
    }
)  # fmt: skip

# Kept for those who run the output; while moe2edge runs a model, it gives these itself.
RUN_KEPT = frozenset(
    {"output_attentions", "output_hidden_states", "output_router_logits", "use_cache"}
)
# Left out of the config of a model, and so of outputs, whose tensors are those of transformers' own
# class: what these ask for may be missing on another machine.
RUN_DROPPED = frozenset(
    {
        "attn_implementation", "auto_map", "base_model_ep_plan", "base_model_fsdp_plan",
        "base_model_pp_plan", "base_model_tp_plan", "distributed_config", "experts_implementation",
        "fusion_config", "gradient_checkpointing", "keys_to_ignore_at_inference", "return_dict",
        "torchscript",
        "use_return_dict", "_attn_implementation", "_attn_implementation_internal",
        "_experts_implementation", "_experts_implementation_internal", "_output_attentions",
    }
)  # fmt: skip
RUN = RUN_KEPT | RUN_DROPPED


@dataclass(frozen=True)
class Fixed:
    """A key that must have one of some values.

    Attributes:
        values: the values with which it changes nothing.
        does: what it does with any other, for the message.
        truth: transformers asks only if the value is true or false.
    """

    values: tuple[Any, ...]
    does: str
    truth: bool = False

    def allows(self, value: Any) -> bool:
        """Return whether the key changes nothing with ``value``."""
        return (bool(value) if self.truth else value) in self.values


_FILES = "which names other files to read"
_NESTED = "which holds the settings of another model"
_IN_CACHE = "which transformers follows in the cache but not in the mask"

# Keys that transformers reads for every family.
FIXED: Mapping[str, Fixed] = {
    "attention_chunk_size": Fixed((None,), _IN_CACHE),
    "configuration_files": Fixed(([],), _FILES),
    "decoder": Fixed((None,), _NESTED),
    "generator": Fixed((None,), _NESTED),
    "is_causal": Fixed((True,), "with which attention sees later tokens", truth=True),
    "is_encoder_decoder": Fixed((False,), "and this is no decoder-only model", truth=True),
    "kv_sharing_modes": Fixed((None,), "with which layers share keys and values"),
    "per_layer_config": Fixed((None, {}), "with which layers differ"),
    "quantization_config": Fixed((None,), "and the model is already quantized"),
    "text_config": Fixed((None,), _NESTED),
    "text_encoder": Fixed((None,), _NESTED),
    "transformers_weights": Fixed((None,), _FILES),
    "vision_feature_select_strategy": Fixed((None, "default", "full"), "which no text model has"),
}

_SCALES = "a scale that transformers' class of this family does not apply"
_CAPS = "a limit of logits that transformers' class of this family does not apply"
_SCORES = "a choice of experts that transformers' class of this family does not make"

# Settings of related families. Transformers' classes here ignore them, so a model that needs one
# of them is computed wrong by transformers itself: it must say what the class does anyway. Only
# settings that leave no trace in the tensors are here: a bias, a shared expert or a norm that the
# class does not have is found as a tensor that it does not know.
OTHER_FAMILIES: Mapping[str, Fixed] = {
    "attn_logit_softcapping": Fixed((None, 0), _CAPS),
    "clip_qkv": Fixed((None,), _CAPS),
    "embedding_multiplier": Fixed((None, 1), _SCALES),
    "final_logit_softcapping": Fixed((None, 0), _CAPS),
    "logits_scaling": Fixed((None, 1), _SCALES),
    "n_group": Fixed((None, 0, 1), _SCORES),
    "residual_multiplier": Fixed((None, 1), _SCALES),
    "routed_scaling_factor": Fixed((None, 1), _SCALES),
    "scoring_func": Fixed((None, "softmax"), _SCORES),
    "topk_group": Fixed((None, 0, 1), _SCORES),
}
# Scales of attention that replace the usual one: (name, its usual value for a size of heads).
ATTENTION_SCALES: Mapping[str, float] = {"attention_multiplier": -0.5, "query_pre_attn_scalar": 1}
# Norms of queries and keys; there are such norms without a tensor.
QK_NORMS = frozenset({"qk_layernorm", "use_qk_norm"})
