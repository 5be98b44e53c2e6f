"""Tiny random checkpoints of every family, and helpers for tests; plug-ins may use them, too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.model.block import Block
from moe2edge.model.experts import PARTS
from moe2edge.model.family import FAMILIES
from moe2edge.model.model import Model
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import Scheme
from moe2edge.storage.journal import BlockResult
from moe2edge.storage.solved_blocks import attach_numbers, attach_rest_numbers

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.calibration.observation import BlockTrace
    from moe2edge.numerics.grid import Quantized

# make(family, **config changes) -> folder
Make = Callable[..., Path]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
WIDTHS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 32, "num_local_experts": 6},
    "olmoe": {"intermediate_size": 32, "num_experts": 6},
    "qwen2_moe": {
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96,
        "intermediate_size": 64,
        "num_experts": 6,
    },
    "qwen3_moe": {
        "moe_intermediate_size": 32,
        "intermediate_size": 64,
        "num_local_experts": 6,
        "head_dim": 32,
    },
}

# Options of `recover` for a few steps on a few samples.
QUICK_TRAINING: dict[str, Any] = {
    "steps": 6, "batch": 4, "held_out": 4, "eval_every": 2, "save_every": 2, "warmup": 0.0,
    "learning_rate": 3e-3,
}  # fmt: skip


def make_checkpoint(
    folder: Path, model_type: str, *, dtype: str = "float32", **changes: Any
) -> Path:
    """Write a random checkpoint of a few hundred kilobytes and return its folder.

    Args:
        folder: output folder; it is created.
        model_type: a row of the family table.
        dtype: dtype of the weights.
        changes: config keys that differ from the defaults.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model_type not in FAMILIES:
        raise ValueError(f"no family {model_type!r}")
    config = AutoConfig.for_model(model_type, **{**SIZES, **WIDTHS[model_type], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms start as ones, biases as zeros: make them matter
                torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 96 entries, one per printable ASCII character and one end token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<end>": 0} | {chr(32 + n): n + 1 for n in range(95)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    wrapped.save_pretrained(folder)


def make_learnable_text(samples: int = 20, length: int = 32) -> Tensor:
    """Make samples whose tokens mostly determine the next one, int64 [samples, length]."""
    import torch

    draw = torch.Generator().manual_seed(samples)
    ids = torch.randint(1, 96, (samples, length), generator=draw)
    for at in range(1, length):
        likely = (3 * ids[:, at - 1] + 1) % 96
        ids[:, at] = torch.where(torch.rand(samples, generator=draw) < 0.8, likely, ids[:, at])
    return ids


def quantize(model: Model, scheme: Scheme, choose: Callable[[str], bool] = lambda _: True) -> Model:
    """Round to nearest every tensor that quantization selects; return the new model.

    Args:
        model: an unquantized model.
        scheme: scheme of the rounded tensors.
        choose: takes the role of a selected tensor; False leaves the tensor as it is.
    """
    from moe2edge.model.roles import list_quantizable
    from moe2edge.numerics.rounding import round_to_nearest

    for block in model.blocks:
        chosen = {role: weight for role, weight in list_quantizable(block) if choose(role)}
        numbers = {r: round_to_nearest(weight.load(), scheme) for r, weight in chosen.items()}
        model = model.replace_block(attach_numbers(block, numbers))
    return model


def add_copies(model: Model, *, shuffled: bool) -> Model:
    """Return ``model`` with copies of its first expert in place of all experts of each layer.

    Args:
        model: a model with MoE layers.
        shuffled: give the neurons of each copy a random order.
    """
    import torch

    from moe2edge.numerics.expert_groups import Matrices

    generator = torch.Generator().manual_seed(4)
    for block, layer in model.moe_blocks:
        first = Matrices(*(getattr(layer.experts[0], part).load() for part in PARTS))
        experts = []
        for one in layer.experts:
            order = torch.randperm(len(first.gate), generator=generator)
            copied = first.permute(order) if shuffled else first
            weights = {
                part: replace(
                    getattr(one, part), load=lambda copied=copied, part=part: getattr(copied, part)
                )
                for part in PARTS
            }
            experts.append(replace(one, **weights))
        copies = replace(layer, experts=tuple(experts))
        model = model.replace_block(replace(block, mlp=copies))
    return model


def assert_cache_changes_nothing(model: Any, ids: Tensor) -> None:
    """Assert that greedy generation with a cache gives the same tokens as without.

    Args:
        model: a transformers model that generates.
        ids: two prompts, int64 [2, length]; padding on the left replaces 7 tokens of the first.
    """
    import torch

    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :7] = mask[0, :7] = 0
    greedy = {
        "attention_mask": mask,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
    }
    cached = model.generate(ids, use_cache=True, **greedy)
    assert cached.shape == (2, ids.shape[1] + 12)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **greedy))


def read_all_numbers(model: Model) -> dict[tuple[int | None, str], Tensor]:
    """Load all tensors by block and role; those outside of blocks by None and name."""
    tensors: dict[tuple[int | None, str], Tensor] = {}
    tensors |= {(None, name): w.load() for name, w in model.rest.items()}
    tensors |= {(b.index, role): w.load() for b in model.blocks for role, w in b.weights()}
    return tensors


class TraceRecorder:
    """Observer that records every trace that a walk over a model shows it."""

    def __init__(self) -> None:
        self.seen: list[BlockTrace] = []

    def observe(self, trace: BlockTrace) -> None:
        """Record the trace of a batch."""
        self.seen.append(trace)

    def result(self) -> list[BlockTrace]:
        """Return all recorded traces."""
        return self.seen


def quantize_ends(model: Model, scheme: Scheme) -> Model:
    """Return the model with head and embedding rounded to nearest, or the tensor that is both."""
    from moe2edge.numerics.rounding import round_to_nearest

    names = {name for name in (model.architecture.embedding, model.head) if name is not None}
    numbers = {name: round_to_nearest(model.rest[name].load(), scheme) for name in names}
    return model.replace_rest(attach_rest_numbers(model.rest, numbers))


class InMemory:
    """Block journal and store that keeps numbers in memory, as they would be read back from disk.

    Attributes:
        last: hidden states after the last block that has a successor.
    """

    def __init__(self) -> None:
        self.last: Tensor | None = None

    def put(self, block: Block, numbers: Mapping[str, Quantized | Tensor]) -> Block:
        """Return the block with handles on the numbers."""
        return attach_numbers(block, numbers)

    def put_rest(
        self, rest: Mapping[str, Weight], numbers: Mapping[str, Quantized | Tensor]
    ) -> dict[str, Weight]:
        """Return all tensors outside of blocks, with handles on the numbers that there are."""
        return {**rest, **attach_rest_numbers(rest, numbers)}

    def restore(self, block: Block) -> tuple[Block, BlockResult] | None:
        """Return None: no block was solved before."""
        return None

    def stream(self) -> Tensor | None:
        """Return None: no hidden states were saved before."""
        return None

    def finish(
        self,
        block: Block,
        numbers: Mapping[str, Quantized | Tensor],
        done: BlockResult,
        hidden: Tensor | None,
    ) -> Block:
        """Keep a copy of the hidden states; return the block with handles on the numbers."""
        if hidden is not None:
            self.last = hidden.clone()
        return self.put(block, numbers)
