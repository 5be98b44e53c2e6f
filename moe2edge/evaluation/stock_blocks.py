"""Run blocks of a folder in stock transformers, which opens it by itself.

The model is loaded whole, or a group of blocks at a time, by transformers' own loading in both
cases.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.errors import Moe2EdgeError, Unsupported, VerificationFailed, join_lines
from moe2edge.evaluation.stock_memory import is_narrow
from moe2edge.model.block import Block
from moe2edge.model.config_keys import RUN_KEPT
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import ALIASES, read_text_config
from moe2edge.model.weights import DTYPES
from moe2edge.runtime.memory import give_back
from moe2edge.runtime.plain_tensors import drop_quantization, find_plain_source

if TYPE_CHECKING:
    from torch import Tensor

# Positions of which logits are compared: each is one row of the vocabulary.
LOGITS = 64
# Positions of a text that is short.
SHORTEST = 48


class StockFailed(Unsupported):
    """Stock transformers cannot run a source, so there is nothing to compare with."""


@dataclass(frozen=True)
class BlockRun:
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


class _PassThrough(nn.Module):
    """In place of a decoder layer whose weights are not loaded."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        # Settings such as its kind of attention, which the model around it looks at.
        self.__dict__.update({k: v for k, v in layer.__dict__.items() if not k.startswith("_")})

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return the hidden states."""
        return hidden_states


@dataclass(frozen=True)
class StockValues:
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


def run_in_stock(
    model: Model, folder: Path, group: Sequence[BlockRun], ids: Tensor | None, last: Tensor | None
) -> StockValues:
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
            return _run_hooked(model, stock, group, ids, last)
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
    model: Model, folder: Path, group: Sequence[BlockRun], *, ends: bool
) -> tuple[Any, list[str]]:
    """Open a folder, whole or in part; return the model and the tensors that were not found."""
    import transformers

    if model.given.get("model_type") in ALIASES:
        config = read_text_config(model.given)
    else:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    # Neutral settings: what a config says about how to run changes no number, nor does padding.
    for part in (config, config.get_text_config(decoder=True)):
        part.update(dict.fromkeys(RUN_KEPT, False) | {"return_dict": True, "pad_token_id": None})
    loaded = {own.block.index for own in group}
    place = find_plain_source(model, folder, config, loaded, ends=ends)
    config = config.get_text_config(decoder=True)
    drop_quantization(config)
    kind = getattr(transformers, model.family.architecture)
    stored = torch.float32 if "state_dict" in place else _find_stored_dtype(model, group, ends=ends)
    kind = _make_part(kind, model.architecture.layers_path, loaded, stored, ends=ends)
    stock, info = kind.from_pretrained(
        **place,
        config=config,
        dtype=stored,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        output_loading_info=True,
    )
    give_back()
    # The smallest first: some are still parts of the file, which stays mapped as long.
    for parameter in sorted(stock.parameters(), key=torch.numel):
        parameter.data = parameter.data.float()
    stock = stock.eval().float()
    give_back()
    return stock, sorted(map(str, info["missing_keys"]))


def _find_stored_dtype(model: Model, group: Sequence[BlockRun], *, ends: bool) -> torch.dtype:
    """Find the dtype of all loaded tensors in files, or else float32.

    Transformers makes one tensor of all experts, and holds them two times over meanwhile.
    """
    weights = [weight for own in group for _, weight in own.block.weights()]
    weights += list(model.rest.values()) if ends else []
    stored: torch.dtype = getattr(torch, DTYPES[weights[0].dtype])
    return stored if is_narrow(weights) else torch.float32


def _make_part(
    stock: type, path: str, loaded: Collection[int], stored: torch.dtype, *, ends: bool
) -> Any:
    """Make a class of transformers of which only some blocks, or the ends, have weights.

    It takes the name and module of the class, by which transformers finds its rules for names of
    tensors; tensors of the parts that it lacks are not read. Parameters are loaded in the dtype of
    the files, which holds their numbers; whatever else its code makes is in float32.
    """

    def initialize(self: Any, config: Any) -> None:
        usual = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            stock.__init__(self, config)  # type: ignore[misc]
        finally:
            torch.set_default_dtype(usual)
        for parameter in self.parameters():
            parameter.data = parameter.data.to(stored)
        layers = self.get_submodule(path)
        for n in range(len(layers)):
            if n not in loaded:
                layers[n] = _PassThrough(layers[n])
        if not ends:
            self.set_input_embeddings(nn.Identity())
            self.set_output_embeddings(nn.Identity())
            self.all_tied_weights_keys = {}
            owner = self.get_submodule(path.rpartition(".")[0])
            if hasattr(owner, "norm"):
                owner.norm = nn.Identity()

    settings = {
        "__init__": initialize,
        "__module__": stock.__module__,
        "_keys_to_ignore_on_load_unexpected": [".*"],
        "can_generate": classmethod(lambda _: False),
    }
    return type(stock.__name__, (stock,), settings)


def _run_hooked(
    model: Model, stock: Any, group: Sequence[BlockRun], ids: Tensor | None, last: Tensor | None
) -> StockValues:
    """Run transformers' model, each block with the input that it had in the walk."""
    layers, outputs, embedded = stock.get_submodule(model.architecture.layers_path), {}, []

    def take(_: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
        embedded.append(args[0] if args else more["hidden_states"])

    def keep(own: BlockRun) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, out: Any) -> None:
            outputs[own.block.index] = out[0] if isinstance(out, tuple) else out

        return hook

    def finish(_: nn.Module, __: Any, out: Any) -> Any:
        return (last, *out[1:]) if isinstance(out, tuple) else last

    hooks = [layers[0].register_forward_pre_hook(take, with_kwargs=True)]
    for own in group:
        layer = layers[own.block.index]
        hooks.append(layer.register_forward_pre_hook(_give(own), with_kwargs=True))
        hooks.append(layers[own.block.index].register_forward_hook(keep(own)))
    if last is not None:
        hooks.append(layers[-1].register_forward_hook(finish))
    text = {"inputs_embeds": group[0].inputs} if ids is None else {"input_ids": ids}
    try:
        out = stock(**text, logits_to_keep=LOGITS)
    finally:
        for handle in hooks:
            handle.remove()
    direct = _call_unreached(model, layers, group)
    rotary = torch.empty(0)
    if not model.family.generic:
        rotary = compute_rotary(stock.model.rotary_emb, list_positions(model))
    window = getattr(stock.config, "sliding_window", None) or 0
    return StockValues(embedded[0], outputs, direct, out.logits[:, -LOGITS:], rotary, window)


def _give(own: BlockRun) -> Callable[..., Any]:
    """Return a hook that gives a layer the input that its block had in the walk."""

    def hook(_: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> Any:
        if args:
            return (own.inputs, *args[1:]), more
        return args, {**more, "hidden_states": own.inputs}

    return hook


def _call_unreached(model: Model, layers: Any, group: Sequence[BlockRun]) -> dict[int, Tensor]:
    """Call the experts of each block that no token reached, by the index of the block."""
    found = {}
    for own in group:
        path = model.architecture.anatomy[own.block.index].experts
        experts = None if path is None else layers[own.block.index].get_submodule(path)
        found[own.block.index] = _call_experts(experts, own)
    return found


def _call_experts(experts: Any, own: BlockRun) -> Tensor:
    """Call the experts of a layer that no token reached: float32 [unreached, hidden]."""
    if not own.unreached:
        return own.direct
    count = len(own.unreached)
    out: Tensor = experts(
        own.vector.expand(count, -1), torch.tensor(own.unreached)[:, None], torch.ones(count, 1)
    )
    return out


# ---- rotary embedding ----------------------------------------------------------------------------


def list_positions(model: Model) -> list[Tensor]:
    """List positions at which rotary embeddings are compared: a few from both ends of the range.

    Some kinds of rotary embedding depend on the last position of a text, so short ones are first.
    """
    longest = model.family.geometry(model.config).max_positions
    ends = (min(SHORTEST, longest), longest)
    return [torch.linspace(0, end - 1, SHORTEST).long()[None] for end in ends]


def compute_rotary(module: Any, positions: Sequence[Tensor]) -> Tensor:
    """Return cosines and sines of positions, one after the other, float32 [2, positions, width]."""
    found = [torch.stack(module(torch.empty(1, dtype=torch.float32), p)) for p in positions]
    return torch.cat(found, dim=2)[:, 0]
