"""Compare what a walk computes for a source with stock transformers' own model of it.

The walk reads tensors and configs by the rules of this project, and everything that is checked
later is checked against the walk. So its own reading is proved once, at the start: transformers
opens the same folder by itself, with the full config, and each block has to give the same output
for the same input. Of a quantized source it gets our dequantized tensors, since its own readers of
some formats are wrong. Transformers' model is loaded whole where it fits into memory, and otherwise
a group of blocks at a time, by its own loading in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.calibration import walk
from moe2edge.errors import InputError, Moe2EdgeError, Unsupported, VerificationFailed, join_lines
from moe2edge.model.config_keys import RUN_KEPT
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model
from moe2edge.progress import Advance
from moe2edge.runtime.memory import IMPORTED, find_limit, give_back
from moe2edge.runtime.plain_tensors import find_plain_source

if TYPE_CHECKING:
    from torch import Tensor

# Largest difference of what a block adds to a token's vector, and of a token's logits, relative to
# the largest number of them.
TOLERANCE = 1e-4
# Rounding of float32 in the sum that a block adds to, relative to its largest number.
ROUNDING = 1e-6
# Gap of router logits, relative to the largest, below which two runs may choose other experts.
NEAR_TIE = 1e-4
# Length of the text: tokens per expert that one token chooses, within bounds.
TOKENS_PER_EXPERT = 8
SHORTEST, LONGEST = 48, 512
# A window of attention makes the text longer, up to this; attention takes its square.
WIDEST = 1024
# Positions of which logits are compared: each is one row of the vocabulary.
LOGITS = 64
# Share of the memory, as its inverse, that transformers' blocks may take at once.
MEMORY_PARTS = 4


@dataclass(frozen=True)
class Agreement:
    """Agreement of a walk over a source with stock transformers.

    Attributes:
        tokens: length of the text.
        difference: largest difference, relative to what `TOLERANCE` is relative to.
        excepted: tokens at near ties of routers that differed by more, of all blocks together.
        called: experts that no token reached, which were called directly.
        peaks: the largest absolute number of the hidden states of each block.
        window: tokens of a window of attention that the text was too short for; 0: there is none.
    """

    tokens: int
    difference: float
    excepted: int
    called: int
    peaks: tuple[float, ...]
    window: int


class StockFailed(Unsupported):
    """Stock transformers cannot run a source, so there is nothing to compare with."""


@dataclass(frozen=True)
class _Own:
    """Values that a walk computes for one block on the text.

    Attributes:
        block: the block.
        inputs, outputs: residual stream before and after it, float32 [1, length, hidden].
        near_ties: whether the router was close to another choice, bool [length].
        unreached: experts that no token reached.
        vector: input of the experts, float32 [1, hidden].
        direct: output of each unreached expert for it, float32 [unreached, hidden].
        peak: largest absolute number of the hidden states.
    """

    block: Block
    inputs: Tensor
    outputs: Tensor
    near_ties: Tensor
    unreached: tuple[int, ...]
    vector: Tensor
    direct: Tensor
    peak: float


def compare_with_stock(
    model: Model,
    folder: Path,
    *,
    without: Sequence[int] = (),
    within: int | None = None,
    advance: Advance = lambda *_: None,
) -> Agreement:
    """Run one text through the walk and through stock transformers, block by block.

    Both get the same input for each block, which the walk computed, so that a difference is that
    of the block alone.

    Args:
        model: the source.
        folder: its folder, which transformers opens by itself.
        without: ids that the text must not have.
        within: bytes for the whole process; None: what the machine has.
        advance: receives progress.

    Raises:
        VerificationFailed: something differs; the message names the first block where it does.
        InputError: both give numbers that are not finite.
        StockFailed: transformers cannot run it, or not in this memory.
    """
    ids = _make_text(model, without)
    limit = find_limit() if within is None else within
    room = max(0, limit - IMPORTED) // MEMORY_PARTS
    whole = 4 * model.parameters <= room
    size = len(model.blocks) if whole else max(1, room // max(1, model.block_nbytes))
    found = _Findings(model, folder)
    embedded = hidden = walk.embed(model, ids)
    count, label = len(model.blocks), "source check"
    for first in range(0, count, size):
        advance(label, first, count)
        group = []
        for block in model.blocks[first : first + size]:
            group.append(_run_block(model, block, hidden))
            hidden = group[-1].outputs
        give_back()
        ends = (ids, hidden) if whole else (None, None)
        stock = _run_in_stock(model, folder, group, *ends)
        found.compare_blocks(stock, group)
    if not whole:
        stock = _run_in_stock(model, folder, (), ids, hidden)
    found.compare_ends(stock, embedded, hidden)
    advance(label, count, count)
    return found.summarize(ids.shape[1])


def _make_text(model: Model, without: Sequence[int]) -> Tensor:
    """Draw the ids of the text, int64 [1, length], from a seeded generator."""
    layers = [layer for _, layer in model.moe_blocks]
    wanted = max((TOKENS_PER_EXPERT * m.router_rows // m.router.top_k for m in layers), default=0)
    longest = model.family.geometry(model.config).max_positions
    length = min(max(wanted, SHORTEST), LONGEST)
    # Whatever is read of the config here, the key is that of transformers as well.
    behind = (model.config.get("sliding_window") or 0) + SHORTEST
    length = min(max(length, behind if behind <= WIDEST else 0), longest)
    usable = torch.ones(model.vocabulary, dtype=torch.bool)
    usable[list(without)] = False
    ids = usable.nonzero().flatten()
    drawn = torch.randint(len(ids), (1, length), generator=torch.Generator().manual_seed(0))
    return ids[drawn]


# ---- the walk ------------------------------------------------------------------------------------


def _run_block(model: Model, block: Block, inputs: Tensor) -> _Own:
    """Run one block of the walk."""
    trace = walk.BlockRunner(model, block).watch(inputs)
    vector = trace.mlp_inputs.flatten(0, -2)[:1].clone()
    near_ties = torch.zeros(inputs.shape[1], dtype=torch.bool)
    unreached: tuple[int, ...] = ()
    direct = torch.empty(0, vector.shape[1])
    if isinstance(block.mlp, MoELayer) and trace.routing is not None:
        near_ties = _find_near_ties(trace.routing.logits, block.mlp.router.top_k)
        reached = set(trace.routing.ids.flatten().tolist())
        unreached = tuple(n for n in range(len(block.mlp.experts)) if n not in reached)
        direct = torch.cat([direct, *(trace.expert_output(n, vector) for n in unreached)])
    seen = (trace.outputs, trace.attended, trace.mlp_outputs)
    peak = max(float(hidden.abs().max()) for hidden in seen)
    return _Own(block, inputs, trace.outputs, near_ties, unreached, vector, direct, peak)


def _find_near_ties(logits: Tensor, top_k: int) -> Tensor:
    """Find the tokens whose last chosen expert is hardly ahead of the next one, bool [tokens]."""
    best = logits.topk(min(top_k + 1, logits.shape[1])).values
    if best.shape[1] <= top_k:
        return torch.zeros(len(logits), dtype=torch.bool)
    return best[:, top_k - 1] - best[:, top_k] <= NEAR_TIE * logits.abs().amax(1)


# ---- stock transformers --------------------------------------------------------------------------


class _PassThrough(nn.Module):
    """In place of a decoder layer whose weights are not loaded."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the hidden states."""
        return hidden_states


@dataclass(frozen=True)
class _Stock:
    """Values that transformers computes.

    Attributes:
        embedded: what enters the first block, float32 [1, length, hidden].
        outputs: residual stream behind each loaded block, by index, same shape.
        direct: outputs of the experts that were called directly, by the index of the block.
        logits: float32 [1, last tokens, vocabulary]; no logits if the head was not loaded.
        rotary: cosines and sines at some positions.
        window: tokens of the window of attention; 0: there is none.
    """

    embedded: Tensor
    outputs: Mapping[int, Tensor]
    direct: Mapping[int, Tensor]
    logits: Tensor
    rotary: Tensor
    window: int


def _run_in_stock(
    model: Model, folder: Path, group: Sequence[_Own], ids: Tensor | None, last: Tensor | None
) -> _Stock:
    """Run blocks of a folder in stock transformers, in float32 and with neutral settings.

    Args:
        model: the source.
        folder: its folder.
        group: the blocks whose weights are loaded.
        ids: the text, int64 [1, length]; None: embedding, last norm and head are not loaded.
        last: hidden states that go into the last norm.

    Raises:
        StockFailed: transformers cannot open or run it.
        VerificationFailed: transformers does not find a tensor.
    """
    import transformers

    try:
        stock, missing = _open_stock(model, folder, group, ends=ids is not None)
        if missing:
            raise VerificationFailed(
                f"source check: transformers finds no {missing[0]} in {folder}, and would run it "
                "with random numbers in its place"
            )
        with torch.no_grad():
            return _run_hooked(stock, group, ids, last, _list_positions(model))
    except Moe2EdgeError:
        raise
    except Exception as error:  # whatever a library may raise on a folder that it does not support
        raise StockFailed(
            f"transformers {transformers.__version__} cannot run it ({type(error).__name__}: "
            f"{join_lines(error)})"
        ) from error
    finally:
        give_back()


def _open_stock(
    model: Model, folder: Path, group: Sequence[_Own], *, ends: bool
) -> tuple[Any, list[str]]:
    """Open a folder, whole or in part; return the model and the tensors that were not found."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    # Neutral settings: what a config says about how to run changes no number, nor does padding.
    config.update(dict.fromkeys(RUN_KEPT, False) | {"return_dict": True, "pad_token_id": None})
    kind = getattr(transformers, model.family.architecture)
    indices = {own.block.index for own in group}
    if len(group) < len(model.blocks) or not ends:
        kind = _make_part(kind, indices, ends=ends)
    stock, info = kind.from_pretrained(
        **find_plain_source(model, folder, config, indices, ends=ends),
        config=config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    return stock.eval(), sorted(map(str, info["missing_keys"]))


def _make_part(stock: type, loaded: Collection[int], *, ends: bool) -> Any:
    """Make a class of transformers of which only some blocks, or the ends, have weights.

    It takes the name and module of the class, by which transformers finds its rules for names of
    tensors; tensors of the parts that it lacks are not read.
    """

    def initialize(self: Any, config: Any) -> None:
        stock.__init__(self, config)  # type: ignore[misc]
        layers = self.model.layers
        for n in range(len(layers)):
            if n not in loaded:
                layers[n] = _PassThrough()
        if not ends:
            self.model.embed_tokens = self.model.norm = self.lm_head = nn.Identity()
            self.all_tied_weights_keys = {}

    settings = {
        "__init__": initialize,
        "__module__": stock.__module__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
        "can_generate": classmethod(lambda _: False),
    }
    return type(stock.__name__, (stock,), settings)


def _run_hooked(
    stock: Any,
    group: Sequence[_Own],
    ids: Tensor | None,
    last: Tensor | None,
    positions: Sequence[Tensor],
) -> _Stock:
    """Run transformers' model, each block with the input that it had in the walk."""
    layers, outputs, embedded = stock.model.layers, {}, []

    def take(_: nn.Module, args: tuple[Any, ...]) -> None:
        embedded.append(args[0])

    def give(own: _Own) -> Callable[..., Any]:
        return lambda _, args: (own.inputs, *args[1:])

    def keep(own: _Own) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            outputs[own.block.index] = out[0] if isinstance(out, tuple) else out

        return hook

    def finish(_: nn.Module, __: Any, out: Any) -> Any:
        return (last, *out[1:]) if isinstance(out, tuple) else last

    hooks = [layers[0].register_forward_pre_hook(take)]
    for own in group:
        hooks.append(layers[own.block.index].register_forward_pre_hook(give(own)))
        hooks.append(layers[own.block.index].register_forward_hook(keep(own)))
    if last is not None:
        hooks.append(layers[-1].register_forward_hook(finish))
    text = {"inputs_embeds": group[0].inputs} if ids is None else {"input_ids": ids}
    try:
        out = stock(**text, logits_to_keep=LOGITS)
    finally:
        for handle in hooks:
            handle.remove()
    direct = {own.block.index: _call_experts(layers[own.block.index], own) for own in group}
    rotary = _compute_rotary(stock.model.rotary_emb, positions)
    window = getattr(stock.config, "sliding_window", None) or 0
    return _Stock(embedded[0], outputs, direct, out.logits, rotary, window)


def _call_experts(layer: Any, own: _Own) -> Tensor:
    """Call the experts of a layer that no token reached: float32 [unreached, hidden]."""
    if not own.unreached:
        return own.direct
    count = len(own.unreached)
    out: Tensor = layer.mlp.experts(
        own.vector.expand(count, -1), torch.tensor(own.unreached)[:, None], torch.ones(count, 1)
    )
    return out


# ---- rotary embedding ----------------------------------------------------------------------------


def _list_positions(model: Model) -> list[Tensor]:
    """List positions at which rotary embeddings are compared: a few from both ends of the range.

    Some kinds of rotary embedding depend on the last position of a text, so short ones are first.
    """
    longest = model.family.geometry(model.config).max_positions
    ends = (min(SHORTEST, longest), longest)
    return [torch.linspace(0, end - 1, SHORTEST).long()[None] for end in ends]


def _compute_rotary(module: Any, positions: Sequence[Tensor]) -> Tensor:
    """Return cosines and sines of positions, one after the other, float32 [2, positions, width]."""
    found = [torch.stack(module(torch.empty(1, dtype=torch.float32), p)) for p in positions]
    return torch.cat(found, dim=2)[:, 0]


# ---- comparison ----------------------------------------------------------------------------------


class _Findings:
    """Collects what was compared, and refuses what differs."""

    def __init__(self, model: Model, folder: Path) -> None:
        self._where = f"source check: {folder}"
        self._model = model
        self._largest = 0.0
        self._excepted = 0
        self._called = 0
        self._peaks: list[float] = []
        self._windows = [block.window or 0 for block in model.blocks]

    def compare_blocks(self, stock: _Stock, group: Sequence[_Own]) -> None:
        """Compare blocks that were run.

        Raises:
            VerificationFailed: one differs; it is named.
        """
        own = walk.build_skeleton(self._model, group[0].block).rotary_emb
        rotary = _compute_rotary(own, _list_positions(self._model))
        self._windows.append(stock.window)
        self._compare("the rotary embedding", rotary, stock.rotary, rotary)
        for one in group:
            name = f"block {one.block.index}"
            other = stock.outputs[one.block.index]
            rounding = ROUNDING / TOLERANCE * one.inputs.abs().amax(-1)
            added = one.outputs - one.inputs
            self._compare(name, one.outputs, other, added, rounding, one.near_ties)
            theirs = stock.direct[one.block.index]
            for n, expert in enumerate(one.unreached):
                at = f"{name}, expert {expert}"
                self._compare(at, one.direct[n], theirs[n], one.direct[n])
            self._called += len(one.unreached)
            self._peaks.append(one.peak)

    def compare_ends(self, stock: _Stock, embedded: Tensor, last: Tensor) -> None:
        """Compare embedding, last norm and head.

        Raises:
            VerificationFailed: one differs.
        """
        self._compare("the embedding", embedded, stock.embedded, embedded)
        logits = torch.stack(list(walk.compute_logits(self._model, last[:, -LOGITS:])))
        self._compare("the last norm or the head", logits, stock.logits, logits)

    def _compare(
        self,
        name: str,
        own: Tensor,
        other: Tensor,
        scale: Tensor,
        more: Tensor | float = 0.0,
        excepted: Tensor | None = None,
    ) -> None:
        """Compare vectors [..., n], each relative to the largest number of ``scale``.

        Args:
            name: what they are.
            own: those of the walk.
            other: those of transformers.
            scale: same shape.
            more: added to the largest number of each vector of ``scale``.
            excepted: vectors that may differ.

        Raises:
            VerificationFailed: they differ.
            InputError: both hold numbers that are not finite.
        """
        if own.shape != other.shape:
            raise self._make_error(name, f"shape {list(own.shape)}, not {list(other.shape)}")
        if (~own.isfinite().all(-1) & ~other.isfinite().all(-1)).any():
            raise InputError(
                f"{self._where}: {name} gives numbers that are not finite, in transformers as "
                "well; weights are beyond what float32 can compute with: the checkpoint is "
                "damaged, get it again"
            )
        sizes = (scale.abs().amax(-1) + more).clamp_min(torch.finfo(torch.float32).tiny)
        differences = ((own - other).abs().amax(-1) / sizes).flatten()
        wrong = ~(differences <= TOLERANCE)  # NaN is wrong
        if excepted is not None:
            self._excepted += int((wrong & excepted).sum())
            differences, wrong = differences[~excepted], wrong[~excepted]
        if not differences.numel():
            return
        worst = float(differences.max())
        if wrong.any():
            count = int(wrong.sum())
            raise self._make_error(name, f"{worst:.1e} for {count} of {len(wrong)} vectors")
        self._largest = max(self._largest, worst)

    def _make_error(self, name: str, what: str) -> VerificationFailed:
        """Make the error for a difference."""
        import transformers

        return VerificationFailed(
            f"{self._where}: {name} does not give what transformers {transformers.__version__} "
            f"computes (relative difference {what}; expected at most {TOLERANCE:.0e}); moe2edge "
            "would build on wrong numbers: please report it"
        )

    def summarize(self, tokens: int) -> Agreement:
        """Return the agreement of all that was compared."""
        longest = self._model.family.geometry(self._model.config).max_positions
        window = max((w for w in self._windows if tokens <= w < longest), default=0)
        peaks = tuple(self._peaks)
        return Agreement(tokens, self._largest, self._excepted, self._called, peaks, window)
