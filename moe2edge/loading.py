"""Load an output folder, ``hf`` or ``gptq``, into a transformers model.

Stock transformers 5 keeps all experts of a layer in one parameter and its GPTQ support replaces
linear layers only, so that the experts of a GPTQ checkpoint come up as random numbers with no more
than a printed report. Here a model of transformers' own classes is built without numbers and
filled block by block; a tensor that is missing, left over or of another shape is an error.
Nothing is registered with transformers, and none of its classes is changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge import per_layer
from moe2edge.artifact import is_artifact, open_artifact
from moe2edge.checkpoint import DTYPES, Checkpoint, header, open_checkpoint, read_tensor
from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.families import family_of
from moe2edge.model import DTYPE_BYTES, Model, Weight, is_quantizable
from moe2edge.scheme import GROUP_SIZES, Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from moe2edge.rounding import Quantized

Header = tuple[tuple[int, ...], str]
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What a GPTQ checkpoint must say of itself; anything else would be read as other numbers.
GPTQ_V1 = {"quant_method": "gptq", "bits": 4, "sym": True, "desc_act": False, "lm_head": False}


def load(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a folder that the target ``hf`` or ``gptq`` wrote, for inference with transformers.

    Quantized weights are dequantized to ``dtype``: the folder is small, the loaded model is not.
    Layers with unequal numbers of experts are honoured, and so is a tokenizer's generation config.
    In float32 every weight equals ``Quantized.dequantize()`` to the bit.

    Args:
        folder: the folder; a hub id works as well.
        dtype: of all parameters; None takes that of the stored embeddings.

    Raises:
        InputError: there is no such folder, or a file of it is damaged.
        Unsupported: another quantization than ours, or a family that is not known.
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
    model = stored_model(checkpoint)
    stored = DTYPES[model.rest["model.embed_tokens.weight"].dtype]
    loaded = to_transformers(model, dtype or getattr(torch, stored))
    loaded.config.name_or_path = checkpoint.source
    if (checkpoint.folder / "generation_config.json").exists():
        loaded.generation_config = GenerationConfig.from_pretrained(checkpoint.folder)
    return loaded


# ---- an output folder as a model ----------------------------------------------------------------


def stored_model(checkpoint: Checkpoint) -> Model:
    """The model in an output folder, quantized or not, from headers only.

    Raises:
        Unsupported: another quantization than ours, or a family that is not known.
        VerificationFailed: a tensor is missing, unexpected or of another shape.
    """
    config = dict(checkpoint.config)
    scheme = _scheme(config.pop("quantization_config", None))
    own = config.pop("per_layer_config", None) or {}
    family = family_of(config)
    stored = _Stored(checkpoint, scheme)
    model = per_layer.read(family.build(config, stored.weight), own, stored.weight)
    stored.check(model)
    model.verify()
    return model


def _scheme(settings: Mapping[str, Any] | None) -> Scheme | None:
    """Scheme of a ``quantization_config``."""
    if settings is None:
        return None
    found = {key: settings.get(key) for key in GPTQ_V1} | {"lm_head": bool(settings.get("lm_head"))}
    layout = settings.get("checkpoint_format", settings.get("format", "gptq"))
    group = settings.get("group_size")
    if found != GPTQ_V1 or layout != "gptq" or group not in GROUP_SIZES:
        raise Unsupported(
            f"quantization {found}, format {layout!r}, group_size {group}; only {GPTQ_V1}, format "
            f"'gptq', group_size {', '.join(map(str, GROUP_SIZES))} can be loaded"
        )
    return Scheme(bits=4, group_size=group)


class _Stored:
    """The tensors of a folder."""

    def __init__(self, checkpoint: Checkpoint, scheme: Scheme | None) -> None:
        self._source = checkpoint.source
        self._scheme = scheme
        self._files = checkpoint.files
        self._headers: dict[str, Header] = {
            name: header(path, name) for name, path in self._files.items()
        }

    def weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        """Handle on a tensor that a model of this config has; `check` tells if it is there."""
        if f"{_stem(name)}.qweight" in self._headers and self._scheme is not None:
            scheme = self._scheme
            return Weight(
                name,
                shape,
                self._headers.get("model.embed_tokens.weight", ((), "F32"))[1],
                load=lambda: self._quantized(name, scheme).dequantize(),
                scheme=scheme,
                load_quantized=lambda: self._quantized(name, scheme),
            )
        dtype = self._headers.get(name, ((), "F32"))[1]
        return Weight(name, shape, dtype, load=lambda: self._read(name))

    def _read(self, name: str) -> Tensor:
        return read_tensor(self._files[name], name)

    def _quantized(self, name: str, scheme: Scheme) -> Quantized:
        """Integers and scales of a matrix.

        Raises:
            VerificationFailed: zero points, the order of inputs or the scales are not ours.
        """
        import torch

        from moe2edge.packing import unpack_gptq
        from moe2edge.rounding import Quantized

        parts = {part: self._read(f"{_stem(name)}.{part}") for part in GPTQ_PARTS}
        q, scales, zeros = unpack_gptq(parts)
        if (zeros != scheme.zero_point).any():
            raise VerificationFailed(
                f"{_stem(name)}.qzeros holds zero points from {int(zeros.min())} to "
                f"{int(zeros.max())}, expected {scheme.zero_point} throughout; the file was "
                "changed, export it again"
            )
        order = torch.arange(q.shape[1], dtype=torch.int32) // scheme.group_size
        if not torch.equal(parts["g_idx"], order):
            raise VerificationFailed(
                f"{_stem(name)}.g_idx reorders the inputs, expected input // "
                f"{scheme.group_size}; the file was changed, export it again"
            )
        if not scales.isfinite().all():
            raise VerificationFailed(
                f"{_stem(name)}.scales are not finite; the file was changed, export it again"
            )
        return Quantized(q, scales, scheme)

    def check(self, model: Model) -> None:
        """Hold the headers against what ``model`` must have.

        Raises:
            VerificationFailed: a tensor is missing, unexpected or of another shape.
        """
        wanted: dict[str, Header] = {}
        for name, role, weight in model.tensors():
            if weight.scheme is None or not is_quantizable(role):
                wanted[name] = (weight.shape, weight.dtype)
            else:
                parts = gptq_parts(weight.shape, weight.scheme)
                wanted |= {f"{_stem(name)}.{part}": want for part, want in parts.items()}
        for found, names in (
            ("lacks", wanted.keys() - self._headers.keys()),
            ("has unexpected", self._headers.keys() - wanted.keys()),
        ):
            if names:
                raise VerificationFailed(
                    f"{self._source} {found} {len(names)} tensors, such as {min(names)}; the "
                    f"folder does not hold the {len(model.blocks)} blocks of its config.json: "
                    "export it again"
                )
        for name, want in wanted.items():
            if self._headers[name] != want or want[1] not in {*DTYPE_BYTES, "I32"}:
                raise VerificationFailed(
                    f"{name} is {self._headers[name]}, but config.json asks for {want}; "
                    "export it again"
                )


def _stem(name: str) -> str:
    return name.removesuffix(".weight")


def gptq_parts(shape: tuple[int, ...], scheme: Scheme) -> dict[str, Header]:
    """Shape and dtype of each tensor that stands for a matrix [out, in] in GPTQ version 1."""
    outs, ins = shape
    groups = ins // scheme.group_size
    headers: tuple[Header, ...] = (
        ((ins // 8, outs), "I32"),
        ((groups, outs // 8), "I32"),
        ((groups, outs), "F16"),
        ((ins,), "I32"),
    )
    return dict(zip(GPTQ_PARTS, headers, strict=True))


# ---- a model as transformers' own class --------------------------------------------------------


def to_transformers(model: Model, dtype: torch.dtype) -> PreTrainedModel:
    """A transformers model with the numbers of ``model``, quantized ones dequantized.

    Memory: the parameters in ``dtype``, and one block in float32 while it is filled.

    Raises:
        VerificationFailed: transformers' classes have other parameters than ``model``.
    """
    from moe2edge.modules import block_state

    loaded = _skeleton(model, dtype)
    for block in model.blocks:
        state = block_state(block)
        # Copied, so that no parameter stays a view into a file.
        state = {name: state.pop(name).to(dtype, copy=True) for name in list(state)}
        _fill(loaded.model.layers[block.index], state, f"block {block.index}", strict=True)
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

    from moe2edge import modules

    config = model.family.transformers_config(model)
    with torch.device("meta"):
        loaded = AutoModelForCausalLM.from_config(config, dtype=dtype)
        modules.fit(loaded.model.layers, model)
    loaded.to(dtype)
    if not model.is_uniform:
        loaded.config.per_layer_config = per_layer.sizes(model)
    if not all(per_layer.is_own_form(model, block) for block in model.blocks):
        loaded.save_pretrained = _refuse_to_save
    return loaded


def _refuse_to_save(*_: object, **__: object) -> None:
    """In place of a method of transformers' that would lose what single layers have."""
    raise Unsupported(
        "save_pretrained loses dynamic skipping, plain experts and layers that were dropped; "
        "copy the folder that this model was loaded from"
    )


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
