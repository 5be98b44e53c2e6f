"""Run what stands before and behind the decoder layers of a model, as transformers does it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moe2edge.model.architecture import build_meta_model, find_layers
from moe2edge.runtime.decoder_blocks import check_finite, load_finite
from moe2edge.runtime.layer_stage import compute_buffers

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.model import Model


class Ends:
    """Transformers' model without its layers: embedding, last norm and head."""

    def __init__(
        self, model: Model, tokens: Tensor | None = None, without: Collection[str] = ()
    ) -> None:
        """Load it in float32.

        Args:
            model: the model.
            tokens: the only ids that will be looked up, of any shape; the rest of the embedding
                table, and the head, are not read. None: hidden states are given instead of ids.
            without: parameters that are not read, as nothing will be computed with them.
        """
        self._model = build_meta_model(model.architecture.config)
        path, layers = find_layers(self._model)
        owner, _, name = path.rpartition(".")
        self._passed: Tensor | None = None
        self._layers = [_Catch(layer, self) for layer in layers]
        setattr(self._model.get_submodule(owner), name, nn.ModuleList(self._layers))
        compute_buffers(self._model, self._model)
        state = {}
        for parameter, weight in model.rest.items():
            if parameter in without:
                continue
            if parameter == model.architecture.embedding and tokens is not None:
                state[parameter] = _load_rows(weight.name, weight.load(), tokens)
            elif parameter in self._model.state_dict():
                state[parameter] = load_finite(weight)
        self._model.load_state_dict(state, strict=False, assign=True)
        self._model.tie_weights()

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """Return what enters the first layer for ids int64 [batch, length]."""
        self._passed = None
        try:
            self._model(input_ids=ids, use_cache=False)
        except _Caught as caught:
            return caught.hidden
        raise AssertionError("the model has no layers")

    @torch.no_grad()
    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Return logits float32 [batch, length, vocabulary] of what leaves the last layer."""
        self._passed = hidden
        found: Tensor = self._model(inputs_embeds=hidden, use_cache=False).logits
        return found.float()

    @torch.no_grad()
    def compute_head_inputs(self, hidden: Tensor) -> Tensor:
        """Return what the head gets, for what leaves the last layer; it does not run."""

        def catch(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _Caught(args[0])

        self._passed = hidden
        hook = self._model.get_output_embeddings().register_forward_pre_hook(catch)
        try:
            self._model(inputs_embeds=hidden, use_cache=False)
        except _Caught as caught:
            return caught.hidden
        finally:
            hook.remove()
        raise AssertionError("the model runs no head")


class _Caught(Exception):
    """Ends a forward pass once the input of the first layer, or of the head, is known."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


class _Catch(nn.Module):
    """In place of a layer: hands on what left the last layer, or catches what enters."""

    def __init__(self, layer: Any, ends: Ends) -> None:
        super().__init__()
        # Settings of the layer, such as its kind of attention, which the model looks at.
        self.__dict__.update({k: v for k, v in layer.__dict__.items() if not k.startswith("_")})
        self.__dict__["_ends"] = ends

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Hand on or catch hidden states."""
        passed: Tensor | None = self.__dict__["_ends"]._passed
        if passed is None:
            raise _Caught(hidden_states)
        return passed


def _load_rows(name: str, table: Tensor, tokens: Tensor) -> Tensor:
    """Return a table in float32 of which only the rows of some ids are set, and take memory."""
    rows = torch.unique(tokens)
    found = torch.empty(table.shape)
    found[rows] = check_finite(name, table[rows].float())
    return found


def embed_with_stock(
    model: Model, tokens: Tensor, parts: Iterable[slice], empty: Callable[..., Tensor]
) -> Tensor:
    """Return what enters the first layer: float32 [samples, length, hidden]."""
    ends = Ends(model, tokens)
    hidden: Tensor | None = None
    for part in parts:
        found = ends.embed(tokens[part])
        if hidden is None:
            hidden = empty((*tokens.shape, found.shape[-1]))
        hidden[part] = found
    assert hidden is not None, "there are no samples"
    return hidden


def compute_logits_with_stock(model: Model, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the logits float32 [length, vocabulary] of each sample [length, hidden]."""
    ends = Ends(model)
    for sample in hidden:
        yield ends.compute_logits(sample[None])[0]


def compute_head_inputs_with_stock(model: Model, hidden: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield what the head gets, float32 [batch, length, hidden], for each batch alike."""
    table = model.architecture.embedding
    ends = Ends(model, without={table} if model.head is None else {table, model.head})
    for part in hidden:
        yield ends.compute_head_inputs(part).float()
