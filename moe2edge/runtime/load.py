"""Load an output folder, ``hf``, ``gptq`` or ``compressed-tensors``, into a transformers model.

Stock transformers 5 stores all experts of a layer in one parameter, and its GPTQ support replaces
linear layers only. So it loads the experts of a GPTQ checkpoint as random numbers, with no more
than a printed report. This module builds a model of the stock classes of transformers on the meta
device and fills it block by block, if possible with matrices that stay packed in 4 bits. A tensor
that is missing, unexpected or of another shape is an error. Nothing is registered with
transformers, and none of its classes is changed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Unsupported, VerificationFailed, join_lines
from moe2edge.model import hf_config
from moe2edge.model import model as model_
from moe2edge.model.architecture import find_layers
from moe2edge.model.block import Block
from moe2edge.model.hf_config import build_transformers_config
from moe2edge.model.model import Model
from moe2edge.model.transformers_config import find_class
from moe2edge.model.weights import DTYPES
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.generation_config import GENERATION_CONFIG, read_generation_config
from moe2edge.storage.manifest import check_sizes, is_artifact, open_artifact
from moe2edge.storage.output import open_stored_model
from moe2edge.storage.safetensors_files import INDEX_FILE

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

# Files that `load` reads; others may be missing in a snapshot of the hub.
READ_FILES = ("config.json", GENERATION_CONFIG, "*.safetensors", INDEX_FILE)


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, packed: bool | None = None
) -> PreTrainedModel:
    """Load a folder of target ``hf``, ``gptq`` or ``compressed-tensors``, for inference.

    In bfloat16, symmetric 4-bit matrices of families with a row stay packed (see
    `moe2edge.runtime.int4`), and the model takes about as much memory as its files. Other quantized
    weights are dequantized to ``dtype``; in float32 every weight equals ``Quantized.dequantize()``
    to the bit. The attribute ``moe2edge_packed`` of the model describes which matrices are packed;
    its text is one line. Layers may have different numbers of experts. A generation config in the
    folder is loaded.

    Args:
        folder: the folder, or a hub id.
        dtype: dtype of all parameters but those for which transformers' class names another; None
            takes that of the stored embeddings.
        packed: None: matrices stay packed where possible; False: none does; True: like None, but
            it is an error if none can.

    Raises:
        InputError: there is no such folder, or one of its files is damaged.
        Unsupported: the quantization is not one of moe2edge, the family is not known, or
            ``packed`` is True and no matrix can run packed.
        VerificationFailed: a file has another size than the manifest says; or a tensor is missing,
            unexpected, of another shape, or not what its format allows.
    """
    import torch
    from transformers import GenerationConfig

    _check_output(Path(folder))
    checkpoint = open_checkpoint(str(folder))
    if checkpoint.folder != Path(folder):  # a snapshot of the hub
        _check_output(checkpoint.folder)
    model = open_stored_model(checkpoint)
    stored = DTYPES[model.embedding.dtype]
    loaded = build_transformers_model(model, dtype or getattr(torch, stored), packed=packed)
    loaded.config.name_or_path = checkpoint.source
    read_generation_config(checkpoint.folder)  # refuses a wrong one in a line
    if (checkpoint.folder / GENERATION_CONFIG).exists():
        loaded.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return loaded


def _check_output(folder: Path) -> None:
    """Compare the sizes of the files that are read with the manifest, if the folder has one.

    Raises:
        InputError: its target writes no safetensors.
        VerificationFailed: a file is missing or has another size.
    """
    if not is_artifact(folder):
        return
    artifact = open_artifact(folder)
    if not any(name.endswith(".safetensors") for name in artifact.files):
        raise InputError(
            f"{folder} is an output of target {artifact.target}, which has no safetensors; run it "
            "with moe2edge generate"
        )
    check_sizes(artifact, READ_FILES)


# ---- a model as a stock class of transformers --------------------------------------------------


def build_transformers_model(
    model: Model, dtype: torch.dtype, *, packed: bool | None = None
) -> PreTrainedModel:
    """Build a transformers model with the numbers of ``model``, packed as in `load`.

    Memory: the parameters in ``dtype``, and the unpacked matrices of one block in float32 while
    the block is filled.

    Raises:
        Unsupported: ``packed`` is True and no matrix can run packed.
        VerificationFailed: the class of transformers has other parameters than ``model``.
    """
    from moe2edge.runtime.int4 import plan_packing
    from moe2edge.runtime.layer_stage import compute_buffers

    plan = plan_packing(model, dtype, wanted=packed)
    loaded, dtypes = _build_skeleton(model, dtype)
    loaded.moe2edge_packed = plan
    if plan.packed:
        loaded.save_pretrained = partial(_refuse_to_save, PACKED_REASON)
    path, layers = find_layers(loaded)
    for block in model.blocks:
        own = dtypes.below(f"{path}.{block.index}.")
        _fill_layer(layers[block.index], model, block, own, pack=bool(plan.packed))
    rest = {name: dtypes.cast(name, weight.load()) for name, weight in model.rest.items()}
    _fill(loaded, rest, "the rest", strict=False)
    loaded.tie_weights()
    # Tables of rotary embeddings and the like, which no checkpoint contains.
    compute_buffers(loaded, loaded)
    empty = [n for n, t in (*loaded.named_parameters(), *loaded.named_buffers()) if t.is_meta]
    if empty:
        raise VerificationFailed(
            f"{len(empty)} tensors of {type(loaded).__name__} were not loaded, such as "
            f"{empty[0]}; this version of transformers is not supported"
        )
    return loaded.eval()


@dataclass(frozen=True)
class _Dtypes:
    """Dtype of each tensor of a model, by the rules of transformers.

    Attributes:
        usual: that of most tensors.
        others: that of tensors whose dtype is written in the class of transformers, by name.
        precise: patterns of names that stay in float32.
        prefix: what stands before names that are asked for.
    """

    usual: torch.dtype
    others: Mapping[str, torch.dtype]
    precise: tuple[str, ...] = ()
    prefix: str = ""

    @classmethod
    def of(cls, loaded: Any, dtype: torch.dtype) -> _Dtypes:
        """Find the dtypes of a new model of transformers, built in ``dtype``."""
        import torch

        others = {name: t.dtype for name, t in loaded.state_dict().items() if t.dtype != dtype}
        precise: set[str] = set()
        if dtype in (torch.float16, torch.bfloat16):
            precise |= set(loaded._keep_in_fp32_modules_strict or ())
        if dtype == torch.float16:
            precise |= set(loaded._keep_in_fp32_modules or ())
        return cls(dtype, others, tuple(sorted(precise)))

    def below(self, prefix: str) -> _Dtypes:
        """Return the dtypes by the names in a module."""
        return replace(self, prefix=prefix)

    def cast(self, name: str, tensor: Tensor) -> Tensor:
        """Return a copy of a tensor, no view into a file, in the dtype that its name asks for."""
        import torch

        full = self.prefix + name
        dtype = self.others.get(full, self.usual)
        if any(re.search(pattern.replace("*", ".*"), full) for pattern in self.precise):
            dtype = torch.float32
        return tensor.to(dtype, copy=True)


def _build_skeleton(model: Model, dtype: torch.dtype) -> tuple[Any, _Dtypes]:
    """Build the transformers model on the meta device, with layers in the form of the blocks."""
    import torch

    from moe2edge.runtime import decoder_blocks
    from moe2edge.runtime.expert_kernels import set_expert_implementation

    config = build_transformers_config(model)
    with torch.device("meta"):
        loaded = find_class(config)._from_config(config, dtype=dtype)
        dtypes = _Dtypes.of(loaded, dtype)
        decoder_blocks.fit_layers(find_layers(loaded)[1], model)
    set_expert_implementation(loaded)
    if not model.is_uniform and model.family.generic:
        # The key means something of its own to some of these classes.
        loaded.save_pretrained = partial(_refuse_to_save, UNEVEN_REASON)
    elif not model.is_uniform:
        loaded.config.per_layer_config = hf_config.encode_sizes(model)
    if not all(model_.is_stock_form(model, block) for block in model.blocks):
        loaded.save_pretrained = partial(_refuse_to_save, FORM_REASON)
    return loaded, dtypes


def _fill_layer(layer: Any, model: Model, block: Block, dtypes: _Dtypes, *, pack: bool) -> None:
    """Fill a decoder layer on the meta device with the numbers of its block."""
    from moe2edge.runtime.decoder_blocks import load_block_state
    from moe2edge.runtime.int4 import pack_layer

    packed_roles = pack_layer(layer, block, dtypes.usual) if pack else frozenset()
    state = load_block_state(model, block, lambda role: role not in packed_roles)
    state = {name: dtypes.cast(name, state.pop(name)) for name in list(state)}
    filled = {name: t for name, t in layer.state_dict().items() if not t.is_meta}
    _fill(layer, state | filled, f"block {block.index}", strict=True)


# Reasons why `save_pretrained` of transformers would write an incomplete checkpoint.
PACKED_REASON = (
    "save_pretrained cannot write matrices that run in 4 bits; copy the folder that this model was "
    "loaded from, or load it with packed=False"
)
UNEVEN_REASON = (
    "save_pretrained loses numbers of experts that differ between layers; copy the folder that "
    "this model was loaded from"
)
FORM_REASON = (
    "save_pretrained loses dynamic skipping, plain experts and layers that were dropped; copy the "
    "folder that this model was loaded from"
)


def _refuse_to_save(reason: str, *_: object, **__: object) -> None:
    """Refuse to save; replaces `save_pretrained`, bound to the reason."""
    raise Unsupported(reason)


def _fill(module: Any, state: dict[str, Tensor], what: str, *, strict: bool) -> None:
    """Fill a module on the meta device with its tensors.

    Args:
        module: the module.
        state: tensors by name.
        what: name of the module, for messages.
        strict: refuse a state that lacks a tensor of the module.

    Raises:
        VerificationFailed: names or shapes differ, or with ``strict`` a tensor is missing.
    """
    try:
        result = module.load_state_dict(state, strict=strict, assign=True)
    except RuntimeError as error:
        raise VerificationFailed(
            f"{what} does not fit the class of transformers: {join_lines(error, 1000)}"
        ) from error
    if result.unexpected_keys:
        raise VerificationFailed(
            f"the class of transformers has no parameter {result.unexpected_keys[0]}"
        )
