"""Families that mlx-lm reads: names of tensors in its folders, and settings that it ignores.

A family is here if logits of mlx-lm were compared (benchmarks/readers). It reads matrices of all
experts of a layer in one tensor, and all else by the names of the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe2edge.errors import Unsupported
from moe2edge.model.block import Block
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import ALIASES

_EXPERT = re.compile(r"(.+)\.experts\.(\d+)\.([^.]+)\.(weight|bias)")
_W123 = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
# Kinds of rotary embeddings that `initialize_rope` of mlx-lm computes as transformers does, and
# settings of theirs that it does not read, with what it does.
ANY_ROPE = ("default", "linear", "llama3", "yarn")
UNREAD_ROPE = {"truncate": (None, True), "attention_factor": (None,)}


@dataclass(frozen=True)
class MlxPlace:
    """Place of a tensor in an MLX folder.

    Attributes:
        module: the module that has it.
        kind: its name there, ``weight`` or ``bias``; empty: the module is a tensor itself.
        expert: the entry of a tensor of all experts; None: it is one of its own.
    """

    module: str
    kind: str
    expert: int | None = None

    @property
    def name(self) -> str:
        """Name of the tensor in the folder."""
        return f"{self.module}.{self.kind}" if self.kind else self.module


@dataclass(frozen=True)
class MlxRow:
    """One family.

    Attributes:
        experts: name of the module of all experts, beside the router.
        parts: names of its matrices, by their names in the source where these differ.
        renamed: further parts of names, by those of the source.
        rope: kinds of rotary embeddings that it computes.
        windows: whether it follows sliding windows.
        dense: whether it takes a dense MLP in single blocks.
        renormalizes: whether the chosen weights are scaled to sum to one; a string is the config
            key that decides, None: the config of the family has no such key.
        tied: whether the embedding has to be the head; None: it may be.
        plain: modules that it rounds anew if they are quantized.
        filled: settings that it asks for and transformers does not know.
    """

    experts: str = "switch_mlp"
    parts: Mapping[str, str] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)
    rope: tuple[str, ...] = ("default",)
    windows: bool = False
    dense: bool = True
    renormalizes: bool | str | None = None
    tied: bool | None = None
    plain: tuple[str, ...] = ()
    filled: Mapping[str, Any] = field(default_factory=dict)

    def place(self, name: str) -> MlxPlace:
        """Return where a tensor of the model is, by its name in files of the source."""
        if found := _EXPERT.fullmatch(name):
            base, number, part, kind = found.groups()
            part = self.parts.get(part, part)
            return MlxPlace(f"{base}.{self.experts}.{part}", kind, int(number))
        for old, new in self.renamed.items():
            name = name.replace(old, new)
        module, _, kind = name.rpartition(".")
        return MlxPlace(module, kind) if kind in ("weight", "bias") else MlxPlace(name, "")

    def list_names(self, name: str, count: int) -> Iterator[str]:
        """Yield the names in files of the source of what is in a tensor of an MLX folder.

        Args:
            name: name of the tensor.
            count: its first dimension.
        """
        back = {new: old for old, new in self.parts.items()}
        stacked = re.compile(rf"(.+)\.{self.experts}\.([^.]+)\.(weight|bias)")
        if (found := stacked.fullmatch(name)) and not found[2].isdigit():
            base, part, kind = found.groups()
            part = back.get(part, part)
            yield from (f"{base}.experts.{n}.{part}.{kind}" for n in range(count))
            return
        for old, new in self.renamed.items():
            name = name.replace(new, old)
        yield name


_DENSE_W123 = {f"feed_forward.{old}.": f"feed_forward.{new}." for old, new in _W123.items()}
ROWS: Mapping[str, MlxRow] = {
    "mixtral": MlxRow(parts=_W123, renormalizes=True),
    "olmoe": MlxRow(rope=ANY_ROPE, renormalizes="norm_topk_prob"),
    "qwen2_moe": MlxRow(dense=False, renormalizes=False, tied=False),
    "qwen3_moe": MlxRow(renormalizes="norm_topk_prob"),
    "afmoe": MlxRow(experts="experts", rope=ANY_ROPE, windows=True),
    "deepseek_v2": MlxRow(rope=("yarn",)),
    "deepseek_v3": MlxRow(rope=ANY_ROPE, plain=("kv_b_proj",)),
    "dots1": MlxRow(experts="experts", rope=ANY_ROPE),
    "glm4_moe": MlxRow(filled={"rope_scaling": None}),
    "glm4_moe_lite": MlxRow(rope=ANY_ROPE, plain=("kv_b_proj",)),
    "gpt_oss": MlxRow(experts="experts", rope=ANY_ROPE, windows=True),
    "granitemoe": MlxRow(rope=ANY_ROPE),
    "lfm2_moe": MlxRow(parts=_W123, renamed=_DENSE_W123, tied=True),
    "mellum": MlxRow(windows=True),
    "minimax_m2": MlxRow(parts=_W123, filled={"shared_intermediate_size": 0}),
}


# ---- settings that mlx-lm ignores ----------------------------------------------------------------


def accept_settings(model: Model, row: MlxRow) -> None:
    """Refuse settings that mlx-lm ignores, and so computes other numbers.

    Raises:
        Unsupported: names the setting.
    """
    for what in _list_ignored(model, row):
        raise Unsupported(
            f"mlx-lm ignores {what} in {model.family.model_type}, so that target mlx would hold "
            "another model; export to hf or gptq"
        )


def _list_ignored(model: Model, row: MlxRow) -> Iterator[str]:
    config = model.config
    rope = read_rope(model)
    if rope and (kind := rope.get("rope_type", "default")) not in row.rope:
        yield f"the kind of the rotary embedding, {kind!r}"
    for key, values in UNREAD_ROPE.items():
        if rope.get(key) not in values:
            yield f"{key} {rope[key]} of the rotary embedding"
    if model.family.generic:
        return
    if windows := [block.window for block in model.blocks if block.window] * (not row.windows):
        yield f"the sliding window of {windows[0]} tokens"
    if config.get("clip_qkv") is not None:
        yield f"clip_qkv {config['clip_qkv']}"
    scaled = model.family.renormalizes(config)
    if isinstance(row.renormalizes, bool) and scaled != row.renormalizes:
        yield f"norm_topk_prob {str(scaled).lower()}"
    geometry = model.family.geometry(config)
    own_head = geometry.head_dim * geometry.heads != geometry.hidden
    if own_head and model.family.model_type in ("mixtral", "qwen2_moe"):
        yield f"head_dim {geometry.head_dim}"


def accept_layers(model: Model, row: MlxRow) -> None:
    """Refuse blocks that mlx-lm's class does not have, and models of several parts.

    Raises:
        Unsupported: so.
    """
    name, whole = model.family.model_type, model.given.get("model_type")
    if ALIASES.get(str(whole), whole) != name:
        raise Unsupported(
            f"the model is the {name} inside of {whole}, which target mlx does not write; export "
            "to hf or gptq"
        )
    for block in model.blocks:
        if not row.dense and not isinstance(block.mlp, MoELayer):
            raise Unsupported(
                f"block {block.index} has a dense MLP, which mlx-lm does not know in {name}; "
                "export to hf or gptq"
            )
    biased = any(_has_bias(block) for block in model.blocks)
    if not model.family.generic and biased != (name == "qwen2_moe") and name != "olmoe":
        has = "a bias" if biased else "no bias"
        raise Unsupported(
            f"attention has {has}, which mlx-lm does not know in {name}; export to hf or gptq"
        )
    tied = bool(model.config.get("tie_word_embeddings"))
    if row.tied not in (None, tied):
        how = "the embedding is" if tied else "the embedding is not"
        raise Unsupported(
            f"{how} the head, which mlx-lm does not know in {name}; export to hf or gptq"
        )


def _has_bias(block: Block) -> bool:
    return "q_proj.bias" in block.attention


def read_rope(model: Model) -> Mapping[str, Any]:
    """Return the settings of the rotary embedding; empty: none, or each kind of layer has some."""
    rope = getattr(model.architecture.config, "rope_parameters", None)
    return rope if isinstance(rope, Mapping) and "rope_theta" in rope else {}
