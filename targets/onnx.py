"""Decoder graph for ONNX Runtime: quantized experts in fused operators, with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.block import Block, is_low_rank, is_quantizable
from moe2edge.model.edits import remove_skipping, sort_rows
from moe2edge.model.hf_config import build_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.numerics.scheme import LOW_RANK, WHOLE_ROW, Scheme
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.text_files import write_bytes, write_json
from moe2edge.storage.tokenizer import read_stop_ids
from moe2edge.targets._loaders import judge_loaders
from moe2edge.targets._onnx_genai import GENAI_CONFIG, build_genai_config

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# GroupQueryAttention's rotary embedding takes head sizes that this divides, on the CPU.
HEAD_MULTIPLE = 16
# Limits of QMoE and MatMulNBits: bits, and inputs per scale, which are a power of two.
GRAPH_BITS = (2, 4, 8)
SMALLEST_GROUP = 16


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX graph with external data, and ``genai_config.json`` beside it.

    Attributes:
        accuracy_level: precision of activations in quantized operators: 4 rounds them to int8,
            which is faster; 0 keeps float32, except for experts of 2 and 8 bits, whose
            activations the operator always rounds.
    """

    summary: ClassVar[str] = "decoder graph with KV cache for ONNX Runtime on a CPU"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxruntime")
    chooses_as_torch: ClassVar[bool] = False
    card_library: ClassVar[str] = "onnxruntime"
    limits: ClassVar[str] = (
        "Prompts of a batch are padded on the right: zeros in `attention_mask` behind a prompt, "
        "whose next token is read from the logits at its last token. With padding on the left the "
        "graph gives wrong logits, without an error."
    )
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise InputError(
                f"accuracy_level is 0 (float32 activations) or 4 (int8), not {self.accuracy_level}"
            )

    def accepts(self, model: Model) -> None:
        """Refuse a model whose heads, schemes or experts the operators do not take.

        Raises:
            Unsupported: names the part of the model that does not fit.
        """
        head_dim = model.family.geometry(model.config).head_dim
        if head_dim % HEAD_MULTIPLE:
            raise Unsupported(
                f"heads of size {head_dim} are not supported, because ONNX Runtime's rotary "
                f"embeddings need a multiple of {HEAD_MULTIPLE}; export to gptq or hf"
            )
        quantized = [(n, role, w) for n, role, w in model.tensors() if w.scheme is not None]
        widths = {w.shape[1] for _, role, w in quantized if is_quantizable(role)}
        for name, role, weight in quantized:
            assert weight.scheme is not None
            if is_low_rank(role) and weight.scheme == LOW_RANK:
                continue
            if not is_quantizable(role):
                raise Unsupported(
                    f"{name} is {weight.scheme}, but the graph holds this tensor in full precision "
                    f"only, and factors also as {LOW_RANK}"
                )
            _accept_scheme(name, weight.shape, weight.scheme, widths)
        for block, layer in model.moe_blocks:
            _accept_layer(block, layer)

    def stored(self, model: Model) -> Model:
        """Return the model with the rows of routers in the order that ``config.json`` tells."""
        return sort_rows(model)

    def estimate(self, model: Model) -> Estimate:
        """Estimate ``model.onnx.data``, in which scales and rotary tables are float32.

        In memory, what is neither quantized nor of low rank is float32 as well.
        """
        from moe2edge.targets._onnx_decoder import build_decoder
        from moe2edge.targets._onnx_storage import compute_offsets

        graph = build_decoder(self.stored(model), self.accuracy_level)
        data = compute_offsets(graph.batches)[1]
        return Estimate(data + graph.widened_nbytes, data)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write ``model.onnx``, ``model.onnx.data`` and the two configs.

        Raises:
            Unsupported: see `accepts`.
        """
        from moe2edge.targets._onnx_decoder import build_decoder
        from moe2edge.targets._onnx_storage import DATA_FILE, GRAPH_FILE, write_data

        self.accepts(model)
        model = self.stored(model)
        graph = build_decoder(model, self.accuracy_level)
        initializers, data = write_data(graph.batches, folder / DATA_FILE)
        content = graph.proto(initializers, _metadata(model)).SerializeToString(deterministic=True)
        config = build_config(model)
        genai = build_genai_config(config, read_stop_ids(folder, config))
        return {
            DATA_FILE: data,
            GRAPH_FILE: write_bytes(folder / GRAPH_FILE, content),
            "config.json": write_json(folder / "config.json", add_older_spellings(config)),
            GENAI_CONFIG: write_json(folder / GENAI_CONFIG, genai),
        }

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read every tensor back from the initializers of the graph, one by one.

        Raises:
            VerificationFailed: the files are damaged.
        """
        from moe2edge.targets._onnx_storage import read_tensors

        return read_tensors(folder)

    def check_derived(self, folder: Path) -> None:
        """Compare rotary tables, attention operators and ``genai_config.json`` with the config.

        Raises:
            VerificationFailed: names the table, the operator or the key.
        """
        from moe2edge.targets._onnx_checks import check_genai_config, check_graph

        check_graph(folder)
        check_genai_config(folder)

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder in ONNX Runtime; ``exact`` makes all activations float32.

        Raises:
            Unsupported: onnxruntime is missing or too old.
            VerificationFailed: onnxruntime refuses the graph.
        """
        from moe2edge.targets._onnx_runtime import open_runtime

        return open_runtime(folder, exact=exact)

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open a graph that runs every chosen expert, with the weights of the folder."""
        from moe2edge.targets._onnx_decoder import build_decoder
        from moe2edge.targets._onnx_runtime import open_runtime
        from moe2edge.targets._onnx_storage import load_graph

        graph = build_decoder(remove_skipping(self.stored(model)), self.accuracy_level)
        protos = {proto.name: proto for proto in load_graph(folder).graph.initializer}
        stored = [protos[slot.name] for batch in graph.batches for slot in batch.slots]
        proto = graph.proto(stored, _metadata(model))
        return open_runtime(folder, graph=proto.SerializeToString())

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the graph."""
        return judge_loaders("onnx", model, model)


def _metadata(model: Model) -> dict[str, str]:
    """Return the metadata of the graph file that `open_runtime` reads."""
    from moe2edge.targets._onnx_storage import POSITIONS_KEY

    return {POSITIONS_KEY: str(model.family.geometry(model.config).max_positions)}


def _accept_scheme(
    name: str, shape: tuple[int, ...], scheme: Scheme, widths: Collection[int]
) -> None:
    """Refuse a matrix whose scheme the operators do not take, or for which they are slow.

    Args:
        name: its name on disk.
        shape: its shape.
        scheme: its scheme.
        widths: numbers of inputs of all quantized matrices, which one group size should divide.

    Raises:
        Unsupported: names the scheme, and the schemes or targets to choose instead.
    """
    group = scheme.group_size
    if scheme.ordered:
        raise Unsupported(
            f"{name} is {scheme}, and the graph has groups of neighbouring inputs only; quantize "
            "it anew in the recipe (rtn or gptq), or export to gptq, which keeps it, or to hf"
        )
    if scheme.bits not in GRAPH_BITS:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds {', '.join(map(str, GRAPH_BITS))} bits; choose "
            "one of these, or export to hf:dequantize=true"
        )
    if group == WHOLE_ROW:
        sizes = (128, 64, 32, SMALLEST_GROUP)
        size = next((n for n in sizes if all(width % n == 0 for width in widths)), None)
        remedy = f"set group_size to {size}, " if size else ""
        raise Unsupported(
            f"{name} is {scheme}, with which ONNX Runtime's experts are 10 to 25 times slower; "
            f"{remedy}leave it in 16 bits with a rule with bits: 16, or export to gptq or "
            "hf:dequantize=true"
        )
    if group < SMALLEST_GROUP or group & (group - 1):
        raise Unsupported(
            f"{name} is {scheme}; the graph takes a group_size that is a power of two, at least "
            f"{SMALLEST_GROUP}"
        )
    if shape[1] % group:
        raise Unsupported(
            f"{name} has {shape[1]} inputs, which groups of {group} do not divide; set group_size "
            "to a smaller number"
        )


def _accept_layer(block: Block, layer: MoELayer) -> None:
    """Refuse experts that one fused operator cannot hold.

    Raises:
        Unsupported: the router has parameters other than its matrix, or experts differ in shape,
            dtype or scheme.
    """
    if layer.router.per_expert:
        raise Unsupported(
            f"block {block.index}: the router has {', '.join(sorted(layer.router.per_expert))} "
            "per expert, for which ONNX Runtime's expert operators have no input"
        )
    experts = [layer.experts[n] for n in _fused(layer)]
    forms = {(e.gate.shape, w.scheme or w.dtype) for e in experts for w in (e.gate, e.up, e.down)}
    if len(forms) > 1:
        raise Unsupported(
            f"block {block.index}: experts differ in width, dtype or scheme, but one fused "
            "operator holds them all; give the experts of a layer one scheme"
        )


def _fused(layer: MoELayer) -> Sequence[int]:
    """Return the experts of a layer that one operator holds."""
    from moe2edge.targets._onnx_columns import Columns

    return range(len(layer.experts)) if layer.is_plain else Columns(layer).fused
