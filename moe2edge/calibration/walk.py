"""The streaming walk: run text through a model one block at a time.

Each block is transformers' own decoder block, built for that block's actual shape, so that every
family's numerics are transformers'. It is loaded, the hidden states of all samples pass through
it, visitors see what happened inside, and it is forgotten. Everything runs in float32: weights in
bfloat16 are exact in it, and so the walk is the reference that runtimes are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from moe2edge.calibration.observation import (
    BlockTrace,
    Facts,
    Observer,
    ObserverFactory,
    RouterTrace,
)
from moe2edge.model.hf_config import build_transformers_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.progress import Advance
from moe2edge.runtime.decoder_blocks import check_finite, fit_layers, load_block_state, load_finite
from moe2edge.runtime.memory import UNLIMITED, Memory
from moe2edge.runtime.mixed_experts import compute_expert_intermediate, compute_expert_output

if TYPE_CHECKING:
    from torch import Tensor

# Tokens in a batch: large enough for fast products, small against the hidden states of a sample.
BATCH_TOKENS = 8192


class BlockRunner:
    """One block of a model, loaded in float32 into transformers' own module."""

    def __init__(self, model: Model, block: Block) -> None:
        self.block = block
        self._base = build_skeleton(model, block)
        state = load_block_state(block)
        self._base.layers[0].load_state_dict(state, strict=True, assign=True)
        self._layer = self._base.layers[0]

    @torch.no_grad()
    def run(self, hidden: Tensor) -> Tensor:
        """Output of the block for ``hidden`` [batch, length, hidden]."""
        out: Tensor = self._base(inputs_embeds=hidden, use_cache=False).last_hidden_state
        return out

    @torch.no_grad()
    def watch(self, hidden: Tensor) -> BlockTrace:
        """Like `run`, and keep what happened inside."""
        inputs: dict[str, Tensor] = {}
        seen: dict[str, Any] = {}

        def keep_input(role: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                inputs[role] = args[0].flatten(0, -2)

            return hook

        def keep_routing(_: nn.Module, args: tuple[Tensor, ...], out: tuple[Tensor, ...]) -> None:
            flat = args[0].flatten(0, -2)
            seen["routing"] = RouterTrace(flat, out[0].float(), out[1].float(), out[2])

        def keep_attended(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen["attended"] = args[0]

        def keep_mlp(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            seen.update(mlp_inputs=args[0], mlp_outputs=out)

        hooks = [
            module.register_forward_pre_hook(keep_input(role))
            for role, module in self._linear_modules()
        ]
        norm, mlp = self._layer.post_attention_layernorm, self._layer.mlp
        hooks += [
            norm.register_forward_pre_hook(keep_attended),
            mlp.register_forward_hook(keep_mlp),
        ]
        if isinstance(self.block.mlp, MoELayer):
            hooks.append(self._layer.mlp.gate.register_forward_hook(keep_routing))
        try:
            outputs = self.run(hidden)
        finally:
            for handle in hooks:
                handle.remove()
        return BlockTrace(
            self.block,
            hidden,
            outputs,
            seen["attended"],
            seen["mlp_inputs"],
            seen["mlp_outputs"],
            seen.get("routing"),
            inputs,
            self._expert_hidden,
            self._expert_output,
        )

    @torch.no_grad()
    def answer(self, inputs: Tensor) -> Tensor:
        """Output [n, hidden] of what follows attention for its inputs [n, hidden]."""
        out: Tensor = self._layer.mlp(inputs[None])
        return out[0]

    def _linear_modules(self) -> Iterator[tuple[str, nn.Module]]:
        for role, _ in self.block.weights():
            kind, _, rest = role.partition(".")
            if kind == "attention" and rest.endswith("_proj.weight"):
                yield role, getattr(self._layer.self_attn, rest.removesuffix(".weight"))
            elif kind == "shared" and rest != "router":
                yield role, getattr(self._layer.mlp.shared_expert, f"{rest}_proj")
            elif kind == "dense":
                yield role, getattr(self._layer.mlp, f"{rest}_proj")

    @torch.no_grad()
    def _expert_hidden(self, expert: int, inputs: Tensor) -> Tensor:
        return compute_expert_intermediate(self._layer.mlp, expert, inputs)

    @torch.no_grad()
    def _expert_output(self, expert: int, inputs: Tensor) -> Tensor:
        return compute_expert_output(self._layer.mlp, expert, inputs)


def build_skeleton(model: Model, block: Block) -> Any:
    """Transformers' base model with only ``block``, without numbers, embeddings and last norm.

    Driving the base model rather than the decoder layer leaves masks, positions and sliding
    windows to transformers.
    """
    from transformers import AutoModel

    model = replace(model, blocks=(replace(block, index=0),))
    # The skeleton has no embedding table; ids of special tokens would point outside of it.
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    config = build_transformers_config(model, vocab_size=1, **special)
    with torch.device("meta"):
        base = AutoModel.from_config(config, dtype=torch.float32)
        fit_layers(base.layers, model)
    base.rotary_emb = type(base.rotary_emb)(config=config)
    base.norm = nn.Identity()
    base.embed_tokens = None
    return base.eval()


def embed(model: Model, tokens: Tensor, memory: Memory = UNLIMITED) -> Tensor:
    """Rows of the embedding table, float32 [samples, length, hidden]."""
    handle = model.rest["model.embed_tokens.weight"]
    table = handle.load()
    hidden = memory.empty((*tokens.shape, table.shape[1]))
    for part in split_batches(tokens):
        hidden[part] = check_finite(handle.name, table[tokens[part]].float())
    return hidden


def split_batches(tokens: Tensor) -> list[slice]:
    """Ranges of samples of about `BATCH_TOKENS` tokens."""
    size = max(1, BATCH_TOKENS // tokens.shape[1])
    return [slice(at, at + size) for at in range(0, len(tokens), size)]


def observe(
    model: Model,
    tokens: Tensor,
    observers: Sequence[Observer[Any]],
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
) -> Tensor:
    """Walk over ``tokens`` int64 [samples, length]; hidden states after the last block."""
    hidden = embed(model, tokens, memory)
    for block in model.blocks:
        advance(label, block.index, len(model.blocks))
        runner = BlockRunner(model, block)
        for part in split_batches(tokens):
            if observers:
                seen = runner.watch(hidden[part])
                for observer in observers:
                    observer.observe(seen)
                hidden[part] = seen.outputs
                del seen
            else:
                hidden[part] = runner.run(hidden[part])
        del runner  # before the next block is loaded
    advance(label, len(model.blocks), len(model.blocks))
    return hidden


def gather(
    model: Model,
    tokens: Tensor,
    kinds: Sequence[ObserverFactory],
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
) -> Facts:
    """What observers of some kinds learn in one walk; without any, nothing is run."""
    observers = {kind: kind() for kind in kinds}
    if observers:
        observe(model, tokens, list(observers.values()), advance, label, memory)
    return Facts({kind: observer.result() for kind, observer in observers.items()})


class Changer(Protocol):
    """Changes blocks one after the other, from what they do and what the source's twins do."""

    def observe(self, trace: BlockTrace, source: BlockTrace) -> None:
        """Take in one batch of the current block, and of its twin in the source model."""
        ...

    def change(self, block: Block) -> Block:
        """The current block as it shall be; then forget it."""
        ...


def change(
    source: Model, model: Model, tokens: Tensor, changer: Changer, advance: Advance, label: str
) -> Model:
    """Change block after block; later blocks see the stream of the blocks as changed.

    Two streams are carried: that of ``model`` as it changes, and that of ``source``, some of whose
    blocks ``model`` may lack.

    Args:
        source: the model that shows what the blocks should put out.
        model: what to change; its blocks are blocks of ``source`` by their origin.
        tokens: int64 [samples, length].
        changer: says how.
        advance: told about progress.
        label: name of the work in progress lines.
    """
    mine, theirs = embed(model, tokens), embed(source, tokens)
    upcoming = iter(source.blocks)
    for block in model.blocks:
        advance(label, block.index, len(model.blocks))
        for twin in upcoming:
            runner = BlockRunner(source, twin)
            if twin.origin == block.origin:
                break
            for part in split_batches(tokens):
                theirs[part] = runner.run(theirs[part])
        current = BlockRunner(model, block)
        for part in split_batches(tokens):
            expected = runner.watch(theirs[part])
            changer.observe(current.watch(mine[part]), expected)
            theirs[part] = expected.outputs
        del runner, current
        changed = changer.change(block)
        model = model.replace_block(changed)
        if block.index + 1 < len(model.blocks):
            runner = BlockRunner(model, changed)
            for part in split_batches(tokens):
                mine[part] = runner.run(mine[part])
    advance(label, len(model.blocks), len(model.blocks))
    return model


class Rewriter(Protocol):
    """Changes blocks one after the other, from what they do."""

    def observe(self, trace: BlockTrace) -> None:
        """Take in one batch of the current block."""
        ...

    def change(self, block: Block) -> Block:
        """The current block as it shall be; then forget it."""
        ...


def rewrite(
    model: Model,
    tokens: Tensor,
    worker: Rewriter,
    advance: Advance,
    label: str,
    memory: Memory = UNLIMITED,
    *,
    propagate: bool = True,
) -> Model:
    """Change block after block from what each does; `change` without a source beside it.

    Args:
        model: what to change.
        tokens: int64 [samples, length], that show what blocks do.
        worker: says how.
        advance: told about progress.
        label: name of the work in progress lines.
        memory: what it may take.
        propagate: later blocks see the stream of the blocks as changed; otherwise as they were.
    """
    hidden, blocks = embed(model, tokens, memory), model.blocks
    for block in blocks:
        advance(label, block.index, len(blocks))
        runner = BlockRunner(model, block)
        for part in split_batches(tokens):
            seen = runner.watch(hidden[part])
            worker.observe(seen)
            if not propagate:
                hidden[part] = seen.outputs
            del seen
        del runner
        new = worker.change(block)
        model = model.replace_block(new)
        if propagate and block.index + 1 < len(blocks):
            runner = BlockRunner(model, new)
            for part in split_batches(tokens):
                hidden[part] = runner.run(hidden[part])
            del runner
    advance(label, len(blocks), len(blocks))
    return model


@torch.no_grad()
def compute_logits(model: Model, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
    """Logits float32 [length, vocabulary] of each sample of ``hidden`` [samples, length, hidden].

    All families end in an RMS norm and a linear head without bias.
    """
    norm = load_finite(model.rest["model.norm.weight"])
    head_name = "lm_head.weight" if "lm_head.weight" in model.rest else "model.embed_tokens.weight"
    head = load_finite(model.rest[head_name])
    eps = model.family.geometry(model.config).eps
    for sample in hidden:
        yield nn.functional.rms_norm(sample, norm.shape, norm, eps) @ head.T
