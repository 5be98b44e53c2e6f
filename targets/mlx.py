"""Folders for mlx-lm on Macs: integers of all experts of a layer in one tensor, affine groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from moe2edge.errors import InputError, Unsupported, VerificationFailed
from moe2edge.model.block import is_quantizable
from moe2edge.model.edits import change_weights, sort_rows
from moe2edge.model.family import Family
from moe2edge.model.model import Model, list_end_names
from moe2edge.model.weights import DTYPES, HeldWeight, Weight
from moe2edge.numerics.scheme import GROUP_SIZES, WHOLE_ROW, Scheme
from moe2edge.pipeline.target import Loader, LoaderRule, Target
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.safetensors_files import check_index, write_checkpoint
from moe2edge.storage.text_files import read_json, write_json
from moe2edge.targets._layouts import describe_layers
from moe2edge.targets._loaders import judge_loaders, list_rules
from moe2edge.targets._mlx_files import (
    MLX_KEYS,
    MlxFolder,
    build_mlx_config,
    get_row,
    plan_mlx_tensors,
)
from moe2edge.targets._mlx_rows import ROWS, accept_layers, accept_settings
from moe2edge.targets._tensors import check_group_size, estimate_file_bytes

if TYPE_CHECKING:
    from torch import Tensor

# Activations up to which a model in bfloat16 is written in float16, which ends at 65504: texts of
# users may have larger ones than that on which they are measured.
SMALL = 4096.0
# The smallest number from which on bfloat16 is too large for float16.
TOO_LARGE = 65536.0


@dataclass(frozen=True)
class Mlx(Target):
    """A folder for mlx-lm: experts, attention and dense MLPs in few bits, or all unquantized.

    Attributes:
        dtype: dtype of all that is not an integer, in which mlx-lm computes: that of the source;
            float16, which has three more bits than bfloat16; or auto: float16 in place of bfloat16
            where activations are small, else that of the source.
    """

    summary: ClassVar[str] = "folder for mlx-lm on Macs; runs on Linux too, for tests"
    streams: ClassVar[bool] = True
    libraries: ClassVar[tuple[str, ...]] = ("torch", "mlx.core", "mlx_lm")
    chooses_as_torch: ClassVar[bool] = False
    card_library: ClassVar[str] = "mlx"
    card_program: ClassVar[str] = "mlx-lm"
    limits: ClassVar[str] = (
        "On a Mac mlx-lm runs the folder in the dtype that its config names. Without a Mac's GPU "
        "it was verified in float32, which is much faster there."
    )
    dtype: Literal["auto", "source", "float16"] = "auto"

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "source", "float16"):
            raise InputError(f"dtype is auto, source or float16, not {self.dtype}")

    def supports(self, family: Family) -> bool:
        """Return whether mlx-lm was seen to compute models of a family rightly."""
        return family.model_type in ROWS

    def check_runtime(self, model: Model) -> None:
        """Refuse to begin where mlx-lm is not installed, or does not take config and tensors.

        Of families with a row, zeros are run as well before any work.

        Raises:
            Unsupported: so.
        """
        from moe2edge.targets._mlx_runtime import import_mlx, try_folder

        import_mlx()
        if model.family.generic:
            stored = self.stored(model)
            try_folder(build_mlx_config(stored), plan_mlx_tensors(stored))

    @property
    def narrow_head(self) -> bool:
        """True: modules have bits of their own."""
        return True

    def check_installed(self, folder: Path) -> None:
        """Refuse to open a folder without mlx-lm.

        Raises:
            Unsupported: it is not installed.
        """
        from moe2edge.targets._mlx_runtime import import_mlx

        import_mlx()

    def accepts(self, model: Model) -> None:
        """Refuse what the format cannot express, and what mlx-lm ignores.

        Raises:
            Unsupported: layers differ, a scheme is none of MLX's, experts of a layer have several,
                or a setting of the model is one that mlx-lm does not know.
        """
        dtype = self.stored(model).embedding.dtype
        if dtype == "F64":
            raise Unsupported(
                "the GPU of a Mac does not compute in float64; convert the source to float32 "
                "(dtype=torch.float32 in from_pretrained, then save_pretrained), or export to onnx"
            )
        row = get_row(model)
        accept_layers(model, row)
        accept_settings(model, row)
        experts: dict[str, Scheme | None] = {}
        for name, role, weight in model.tensors():
            place = row.place(name)
            single = place.expert is None or place.kind != "weight"
            if not single and experts.setdefault(place.module, weight.scheme) != weight.scheme:
                raise Unsupported(
                    f"{place.module} would hold experts of several schemes, such as "
                    f"{weight.scheme}; give the experts of a layer one scheme, or export to gptq"
                )
            if weight.scheme is not None:
                if not is_quantizable(role) and name not in list_end_names(model):
                    raise Unsupported(
                        f"target mlx keeps {name} in the source's precision, but it is "
                        f"{weight.scheme}; export to gptq"
                    )
                _accept(name, weight, weight.scheme, dtype)
                if any(f".{module}." in name for module in row.plain):
                    raise Unsupported(
                        f"mlx-lm rounds {name} once more when it loads a folder; leave it in 16 "
                        f"bits with a rule such as {{match: {row.plain[0]}, bits: 16}}, or "
                        "export to gptq or compressed-tensors"
                    )

    def stored(self, model: Model) -> Model:
        """Return the model with rows in the order of files, and without other parts.

        Raises:
            Unsupported: layers differ in size or form.
        """
        model = sort_rows(model)
        if not model.is_uniform:
            raise Unsupported(
                "target mlx holds only MoE layers of one size without dynamic skipping, tied or "
                f"replaced experts, as mlx-lm does, but the model has {describe_layers(model)}; "
                "prune all layers to the same size, or export to gptq or hf:layout=natural"
            )
        model = replace(model, carried={})
        return _narrow(model) if self.dtype == "float16" else model

    def settle(self, model: Model, largest: float) -> Mlx:
        """Choose float16 in place of bfloat16 where activations, and kept scales, allow it.

        Raises:
            Unsupported: float16 was asked for, and does not hold the activations.
        """
        if self.dtype == "float16" and not largest < TOO_LARGE / 2:
            raise Unsupported(
                f"the largest activation on the evaluation text is {largest:.0f}, and float16 ends "
                "at 65504; choose mlx:dtype=source"
            )
        if self.dtype != "auto":
            return self
        kept = {w.scale_dtype for _, _, w in model.tensors() if w.scheme is not None and w.kept}
        small = largest <= SMALL and model.embedding.dtype == "BF16" and kept <= {"F16", ""}
        return replace(self, dtype="float16" if small else "source")

    def find_dtype(self, model: Model) -> str:
        """Return the dtype in which mlx-lm runs a folder: that of the embedding."""
        return DTYPES[self.stored(model).embedding.dtype]

    def estimate(self, model: Model) -> Estimate:
        """Estimate the weight files, and in memory what is not quantized in float32."""
        stored = self.stored(model)
        size = estimate_file_bytes(plan_mlx_tensors(stored))
        plain = sum(w.nbytes for _, _, w in stored.tensors() if w.scheme is None)
        return Estimate(size + plain, size)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write ``config.json`` and the weights, those of the experts of a layer at a time.

        Raises:
            Unsupported: see `stored`.
            VerificationFailed: a scale is not exact in the dtype of the model.
        """
        model = self.stored(model)
        config = build_mlx_config(model)
        written = {"config.json": write_json(folder / "config.json", config)}
        return written | write_checkpoint(folder, plan_mlx_tensors(model))

    def check_derived(self, folder: Path) -> None:
        """Compare the two places of the schemes, and the index with the shards.

        Raises:
            VerificationFailed: names the file.
        """
        config = read_json(folder / "config.json")
        if config.get(MLX_KEYS[0]) != config.get(MLX_KEYS[1]):
            raise VerificationFailed(
                f"config.json has other schemes in {MLX_KEYS[1]} than in {MLX_KEYS[0]}; export it "
                "again"
            )
        check_index(folder)

    def streamed(self, folder: Path) -> Model:
        """Open the folder as a model."""
        return MlxFolder(open_checkpoint(str(folder))).model

    def outline(self, folder: Path) -> Model:
        """Return the model of a folder, in which every group has a scale and a bias of 16 bits."""
        model = change_weights(self.streamed(folder), lambda _, w: _outline_weight(w))
        return model.replace_rest({name: _outline_weight(w) for name, w in model.rest.items()})

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder in mlx-lm; ``exact`` computes in float32, and so does a CPU.

        Raises:
            Unsupported: mlx-lm is not installed.
            VerificationFailed: it refuses the folder.
        """
        from moe2edge.targets._mlx_runtime import open_mlx_runtime

        return open_mlx_runtime(folder, exact=exact)

    def rules(self) -> tuple[LoaderRule, ...]:
        """List all verdicts on programs with their conditions."""
        return list_rules(self.name)

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the folder."""
        return judge_loaders(self.name, model, self.stored(model))


def _narrow(model: Model) -> Model:
    """Return a model with unquantized numbers in float16 that are in bfloat16.

    Numbers from 2 ** -17 on keep all their bits. Integers stay; their scales are those of a grid
    that both dtypes hold.
    """
    ends = list_end_names(model)

    def change(name: str, weight: Weight) -> Weight | None:
        if weight.dtype != "BF16" or (weight.scheme is not None and name not in ends):
            return None
        if weight.scheme is not None:
            return replace(weight, dtype="F16")
        return replace(weight, dtype="F16", load=lambda: _to_float16(weight))

    rest = {
        name: change(model.names.get_rest_name(name), weight) or weight
        for name, weight in model.rest.items()
    }
    return replace(change_weights(model, change), rest=rest)


def _to_float16(weight: Weight) -> Tensor:
    """Load a weight in float16.

    Raises:
        Unsupported: it has numbers that are too large.
    """
    import torch

    found = weight.load().to(torch.float16)
    if not found.isfinite().all():
        raise Unsupported(
            f"{weight.name} has numbers beyond those of float16; choose mlx:dtype=source"
        )
    return found


def _accept(name: str, weight: Weight, scheme: Scheme, dtype: str) -> None:
    """Refuse a matrix whose scheme MLX does not have.

    Raises:
        Unsupported: so, with what to choose instead.
    """
    if not scheme.symmetric or scheme.ordered:
        why = "MLX would round their zero points" if not scheme.symmetric else "MLX has no order"
        raise Unsupported(
            f"{name} is {scheme}, and {why}; quantize it symmetrically, with symmetric: true, or "
            "export to gptq"
        )
    sizes = sorted(GROUP_SIZES)
    if scheme.group_size not in sizes:
        other = "gptq" if scheme.group_size == WHOLE_ROW else "hf:dequantize=true"
        raise Unsupported(
            f"{name} is {scheme}; target mlx takes groups of {', '.join(map(str, sizes))}; choose "
            f"one of these that divides its {weight.shape[1]} inputs, or export to {other}"
        )
    check_group_size(name, weight.shape[1], scheme)
    if weight.kept and weight.scale_dtype not in ("", dtype) and dtype != "F32":
        raise Unsupported(
            f"{name} has scales of {weight.scale_dtype} in the source, and the model is {dtype}, "
            f"but an MLX folder has one dtype; {_say_dtype(weight.scale_dtype)}quantize it anew in "
            "the recipe, or export to gptq"
        )


def _outline_weight(weight: Weight) -> Weight:
    """Return a handle with the bytes of the folder."""
    if weight.scheme is None:
        return weight
    outs, ins = weight.shape
    held = outs * ins * weight.scheme.bits // 8 + outs * weight.scheme.groups(ins) * 4
    return HeldWeight(weight.name, weight.shape, weight.dtype, weight.load, held=held)


def _say_dtype(kept: str) -> str:
    return "choose mlx:dtype=float16, " if kept == "F16" else ""
