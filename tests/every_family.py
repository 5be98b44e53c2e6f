"""Tiny random models of every MoE family that transformers knows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from moe2edge.calibration import walk
from moe2edge.calibration.block_runner import BlockRunner
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import find_class
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.targets.hf import Hf

EXPERTS, CHOSEN = 8, 2
KEPT = (0, 1, 3, 4, 6, 7)  # of eight, the same number of each half
IDS = torch.randint(1, 96, (2, 24), generator=torch.Generator().manual_seed(5))
# Settings by the names that families give them; each config takes those that its class has.
# Of logits of a few: rounding in float32.
ROUNDING = 1e-5

COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False, "initializer_range": 0.15,
    # experts
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "num_experts_per_token": CHOSEN,
    "moe_k": CHOSEN, "moe_topk": CHOSEN, "moe_intermediate_size": 32, "n_shared_experts": 1,
    "num_shared_experts": 1, "moe_num_shared_experts": 1, "shared_intermediate_size": 48,
    "shared_expert_intermediate_size": 48, "n_group": 2, "topk_group": 1, "num_expert_group": 2,
    "routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "moe_layer_start_index": 1, "moe_layer_end_index": -1,
    # attention of other kinds
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 16, "index_topk": 64, "index_head_dim": 16, "index_n_heads": 2,
    "sliding_window": 8, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_d_state": 8,
    "mamba_dt_rank": 8, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1,
    "mamba_num_heads": 8, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2,
}  # fmt: skip
LATENT = {"head_dim": 8, "num_key_value_heads": 4}
SCALED = {
    "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22,
    "attention_multiplier": 0.0625,
}  # fmt: skip
MIXED = ["linear_attention", "full_attention"] * 2
# What a family needs besides, or cannot do with.
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT | {"n_group": None, "topk_group": None},
    "bailing_hybrid": {"layer_group_size": 2, "num_key_value_heads": 4},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v2": LATENT | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": CHOSEN, "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_global_key_value_heads": 2, "vocab_size_per_layer_input": 96,
        "hidden_size_per_layer_input": 0,
    },
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "granitemoe": SCALED,
    "granitemoe_swa": SCALED,
    "granitemoehybrid": SCALED | {
        "layer_types": MIXED, "mamba_expand": 2, "mamba_chunk_size": 16,
        "position_embedding_type": "rope",
    },
    "granitemoeshared": SCALED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"layer_types": MIXED, "q_lora_rank": None, "num_key_value_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "minimax": {"block_size": 8},
    "mistral4": {"num_key_value_heads": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
        "num_hidden_layers": None, "moe_shared_expert_intermediate_size": 48,
        "use_mamba_kernels": False, "chunk_size": 16, "expand": 2,
    },
    "qwen3_5_moe_text": {"layer_types": MIXED},
    "qwen3_next": {"layer_types": MIXED},
}  # fmt: skip
TABLED = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")
GENERIC = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "dots1", "dots3_note_text", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "flint", "gemma4_text", "glm4_moe", "glm4_moe_lite", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "jamba",
    "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "mellum", "mimo_v2_flash", "minimax",
    "minimax_m2", "minimax_m3_vl_text", "mistral4", "nemotron_h", "phimoe", "qwen3_5_moe_text",
    "qwen3_next", "solar_open",
)  # fmt: skip


def spread_families(
    fast: tuple[str, ...], share: int, families: Sequence[str] = GENERIC
) -> list[Any]:
    """Return families as parameters of tests that take a while.

    Those of ``fast`` are always run, and a sixth of all others, by ``share`` (0 to 5), where tests
    are not only the quick ones. The rest is run by ``--all-cells``.
    """
    return [
        family
        if family in fast
        else pytest.param(family, marks=[pytest.mark.slow] + [pytest.mark.rest] * (n % 6 != share))
        for n, family in enumerate(families)
    ]


def make_config(family: str, **changes: Any) -> Any:
    """Return transformers' config of a tiny model."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    own = {key: value for key, value in COMMON.items() if key in known}
    return kind(**{**own, **OWN.get(family, {}), **changes})


def make_model(family: str, **changes: Any) -> Any:
    """Return a tiny random model of transformers' class, in float32."""
    config = make_config(family, **changes)
    torch.manual_seed(0)
    model = find_class(config)._from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() < 2 or parameter.std() == 0:  # biases and norms
                parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if "bias" in name and buffer.is_floating_point():
                buffer.add_(torch.randn_like(buffer) * 0.05)
    return model.eval()


def make_folder(folder: Path, family: str, **changes: Any) -> Any:
    """Write a tiny model as transformers does, and return it."""
    model = make_model(family, **changes)
    model.save_pretrained(folder)
    return model


def walk_over(model: Model) -> Tensor:
    """Logits of a walk."""
    hidden = walk.embed(model, IDS)
    for block in model.blocks:
        hidden = BlockRunner(model, block).run(hidden)
    return torch.stack(list(walk.compute_logits(model, hidden)))


@torch.no_grad()
def run_stock(model: Any) -> Tensor:
    """Logits of transformers' model."""
    logits: Tensor = model(IDS, use_cache=False).logits
    return logits


def keep_six(model: Model) -> Model:
    for block, _ in model.moe_blocks:
        model = model.replace_block(block.keep_experts(KEPT))
    return model


def write_and_load(stock: Any, model: Model, out: Path) -> Any:
    """Write target hf, and return what transformers' class reads there: all of it, and no more."""
    out.mkdir()
    target = Hf()
    target.accepts(model)
    target.write(model, out)
    again, found = type(stock).from_pretrained(
        out, output_loading_info=True, dtype=torch.float32, local_files_only=True
    )
    assert not any(found.values()), found
    return again.eval()


def check_walk_and_trimming(stock: Any, folder: Path) -> None:
    """Compare a walk over ``folder/source`` with transformers' model, whole and trimmed.

    Transformers gives the logits of the walk, and so it does from what was written; only the order
    in which the outputs of experts are summed differs.
    """
    model = open_checkpoint(folder / "source").model
    assert (walk_over(model) - run_stock(stock)).abs().max() <= ROUNDING
    trimmed = keep_six(model)
    out, target = folder / "out", Hf()
    again = write_and_load(stock, trimmed, out)
    expected = walk_over(trimmed)
    assert (run_stock(again) - expected).abs().max() <= ROUNDING
    assert torch.equal(walk_over(target.streamed(out)), expected)
    reopened = target.reopen(out, exact=True).logits(IDS)
    assert (reopened - expected).abs().max() <= 1e-5
    written = dict(target.tensors(out))
    tensors = {name: weight for name, _, weight in trimmed.tensors()}
    assert written.keys() == tensors.keys()
    for name, weight in tensors.items():
        assert torch.equal(cast(Tensor, written[name]), weight.load())
