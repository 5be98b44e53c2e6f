"""Load an output folder, ``hf`` or ``gptq``, into a transformers model.

Stock transformers 5 keeps all experts of a layer in one parameter and its GPTQ support replaces
linear layers only, so that the experts of a GPTQ checkpoint come up as random numbers with no more
than a printed report. Here a model of transformers' own classes is built without numbers and
filled block by block, where it can with matrices that stay in 4 bits; a tensor that is missing,
left over or of another shape is an error. Nothing is registered with transformers, and none of
its classes is changed.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.model import hf_config
from moe2edge.model import model as model_
from moe2edge.model.hf_config import build_transformers_config
from moe2edge.model.model import Block, Model
from moe2edge.model.weights import DTYPES
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.manifest import is_artifact, open_artifact
from moe2edge.storage.output import open_stored_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, packed: bool | None = None
) -> PreTrainedModel:
    """Load a folder that the target ``hf`` or ``gptq`` wrote, for inference with transformers.

    In bfloat16, symmetric 4-bit matrices stay in 4 bits (see `moe2edge.runtime.int4`), and the model is
    about as large in memory as its files are. Other quantized weights are dequantized to
    ``dtype``; in float32 every weight equals ``Quantized.dequantize()`` to the bit. The model's
    ``moe2edge_packed`` tells which is which; printed, it is one line.
    Layers with unequal numbers of experts are honoured, and so is a tokenizer's generation config.

    Args:
        folder: the folder; a hub id works as well.
        dtype: of all parameters; None takes that of the stored embeddings.
        packed: None: matrices stay in 4 bits where they can; False: none does; True: as None, but
            it is an error if none can.

    Raises:
        InputError: there is no such folder, or a file of it is damaged.
        Unsupported: another quantization than ours, a family that is not known, or ``packed`` is
            True and nothing can run packed.
        VerificationFailed: a tensor is missing, unexpected, of another shape, or not what its
            format allows.
    """
    import torch
    from transformers import GenerationConfig

    place = Path(folder)
    if is_artifact(place) and not any(place.glob("*.safetensors")):
        raise InputError(
            f"{folder} is an output of target {open_artifact(place).target}, which has no "
            "safetensors; run it with moe2edge generate"
        )
    checkpoint = open_checkpoint(str(folder))
    model = open_stored_model(checkpoint)
    stored = DTYPES[model.rest["model.embed_tokens.weight"].dtype]
    loaded = build_transformers_model(model, dtype or getattr(torch, stored), packed=packed)
    loaded.config.name_or_path = checkpoint.source
    if (checkpoint.folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return loaded


# ---- a model as transformers' own class --------------------------------------------------------


def build_transformers_model(
    model: Model, dtype: torch.dtype, *, packed: bool | None = None
) -> PreTrainedModel:
    """A transformers model with the numbers of ``model``, packed as `load` says.

    Memory: the parameters in ``dtype``, and what is not packed of one block in float32 while it
    is filled.

    Raises:
        Unsupported: ``packed`` is True and nothing can run packed.
        VerificationFailed: transformers' classes have other parameters than ``model``.
    """
    from moe2edge.runtime.int4 import plan_packing

    how = plan_packing(model, dtype, wanted=packed)
    loaded = _skeleton(model, dtype)
    loaded.moe2edge_packed = how
    if how.packed:
        loaded.save_pretrained = partial(_refuse_to_save, PACKED)
    for block in model.blocks:
        _fill_layer(loaded.model.layers[block.index], block, dtype, pack=bool(how.packed))
    rest = {name: weight.load().to(dtype, copy=True) for name, weight in model.rest.items()}
    _fill(loaded, rest, "the rest", strict=False)
    loaded.tie_weights()
    # Built without numbers as well, and no checkpoint has its tables.
    loaded.model.rotary_emb = type(loaded.model.rotary_emb)(config=loaded.config)
    empty = [n for n, t in (*loaded.named_parameters(), *loaded.named_buffers()) if t.is_meta]
    if empty:
        raise VerificationFailed(
            f"{len(empty)} tensors of {type(loaded).__name__} were not filled, such as "
            f"{empty[0]}; this version of transformers is not supported"
        )
    return loaded.eval()


def _skeleton(model: Model, dtype: torch.dtype) -> Any:
    """The transformers model without numbers, its layers in the form of the model's blocks."""
    import torch
    from transformers import AutoModelForCausalLM

    from moe2edge.runtime import decoder_blocks

    config = build_transformers_config(model)
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(config, dtype=dtype)
        decoder_blocks.fit_layers(loaded.model.layers, model)
    loaded.to(dtype)
    if not model.is_uniform:
        loaded.config.per_layer_config = hf_config.encode_sizes(model)
    if not all(model_.is_stock_form(model, block) for block in model.blocks):
        loaded.save_pretrained = partial(_refuse_to_save, OWN_FORMS)
    return loaded


def _fill_layer(layer: Any, block: Block, dtype: torch.dtype, *, pack: bool) -> None:
    """Give a decoder layer without numbers those of its block."""
    from moe2edge.runtime.decoder_blocks import load_block_state
    from moe2edge.runtime.int4 import pack_layer

    held = pack_layer(layer, block, dtype) if pack else frozenset()
    state = load_block_state(block, lambda role: role not in held)
    # Copied, so that no parameter stays a view into a file.
    state = {name: state.pop(name).to(dtype, copy=True) for name in list(state)}
    filled = {name: t for name, t in layer.state_dict().items() if not t.is_meta}
    _fill(layer, state | filled, f"block {block.index}", strict=True)


# Why `save_pretrained` of transformers will not do.
PACKED = (
    "save_pretrained cannot write matrices that run in 4 bits; copy the folder that this model was "
    "loaded from, or load it with packed=False"
)
OWN_FORMS = (
    "save_pretrained loses dynamic skipping, plain experts and layers that were dropped; copy the "
    "folder that this model was loaded from"
)


def _refuse_to_save(reason: str, *_: object, **__: object) -> None:
    """In place of `save_pretrained`, bound to the reason."""
    raise Unsupported(reason)


def _fill(module: Any, state: dict[str, Tensor], what: str, *, strict: bool) -> None:
    """Give a module without numbers its tensors.

    Raises:
        VerificationFailed: names or shapes differ; with ``strict``, a name is missing.
    """
    try:
        result = module.load_state_dict(state, strict=strict, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise VerificationFailed(f"{what} does not fit transformers' class: {reason}") from error
    if result.unexpected_keys:
        raise VerificationFailed(f"transformers' class has no {result.unexpected_keys[0]}")
