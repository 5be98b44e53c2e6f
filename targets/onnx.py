"""Decoder graph for ONNX Runtime: quantized experts in fused operators, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.block import Block, is_low_rank, is_quantizable
from moe2edge.model.edits import remove_skipping, sort_rows
from moe2edge.model.hf_config import build_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model, list_end_names
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import LOW_RANK, WHOLE_ROW, Scheme
from moe2edge.pipeline.target import SMALL_FILES, Loader, Target
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.text_files import write_bytes, write_json
from moe2edge.storage.tokenizer import read_stop_ids
from moe2edge.targets._loaders import judge_loaders
from moe2edge.targets._onnx_genai import GENAI_CONFIG, build_genai_config
from moe2edge.targets._tensors import check_group_size

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.targets._onnx_graph import Graph

# GroupQueryAttention's rotary embedding takes head sizes that this divides, on the CPU.
HEAD_MULTIPLE = 16
# Limits of QMoE and MatMulNBits: bits, and inputs per scale, which are a power of two.
GRAPH_BITS = (2, 4, 8)
SMALLEST_GROUP = 16
# Bits that QMoE alone takes, and its groups then.
EXPERT_BITS, EXPERT_GROUPS = 3, (32, 64, 128)
# Bits of a quantized head or embedding.
END_BITS = 8


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX graph with external data, and ``genai_config.json`` beside it.

    Attributes:
        accuracy_level: precision of activations in quantized operators: 4 rounds them to int8,
            which is faster; 0 keeps float32, except for experts of 2 and 8 bits, whose
            activations the operator always rounds.
        kv_cache: dtype of cached keys and values: int8 takes a quarter of the memory of float32,
            with scales that are measured on the calibration text.
    """

    summary: ClassVar[str] = "decoder graph with KV cache for ONNX Runtime on a CPU"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxruntime")
    chooses_as_torch: ClassVar[bool] = False
    runtime_nbytes: ClassVar[int] = 295_000_000
    cache_nbytes: ClassVar[int] = 4
    forgets: ClassVar[bool] = False
    logits_rows: ClassVar[int] = 256
    card_library: ClassVar[str] = "onnxruntime"
    limits: ClassVar[str] = (
        "Prompts of a batch are padded on the right: zeros in `attention_mask` behind a prompt, "
        "whose next token is read from the logits at its last token. With padding on the left the "
        "graph gives wrong logits, without an error."
    )
    accuracy_level: int = 4
    kv_cache: Literal["float32", "int8"] = "float32"

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise InputError(
                f"accuracy_level is 0 (float32 activations) or 4 (int8), not {self.accuracy_level}"
            )
        if self.kv_cache not in ("float32", "int8"):
            raise InputError(f"kv_cache is float32 or int8, not {self.kv_cache}")

    @property
    def _int8_cache(self) -> bool:
        return self.kv_cache == "int8"

    @property
    def reads_calibration(self) -> bool:
        """True if it measures the scales of a cache in int8."""
        return self._int8_cache

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
            if name in list_end_names(model):
                _accept_end(name, weight)
                continue
            if not is_quantizable(role):
                raise Unsupported(
                    f"{name} is {weight.scheme}, but the graph holds this tensor in full precision "
                    f"only, and factors also as {LOW_RANK}"
                )
            if weight.scheme.bits == EXPERT_BITS and role.startswith("experts."):
                _accept_3_bits(name, weight)
            else:
                _accept_scheme(name, weight.shape, weight.scheme, widths)
        for block, layer in model.moe_blocks:
            _accept_layer(block, layer)
        if _has_3_bits(model):
            from moe2edge.targets._onnx_runtime import check_3_bits

            check_3_bits()

    def stored(self, model: Model) -> Model:
        """Return the model with the rows of routers in the order that ``config.json`` tells."""
        return sort_rows(model)

    def estimate(self, model: Model) -> Estimate:
        """Estimate ``model.onnx.data``, in which rotary tables are float32, and scales in part.

        In memory, what is neither quantized nor of low rank is float32 as well.
        """
        return _measure(self._build(self.stored(model)))

    def estimate_folder(self, model: Model, folder: Path) -> Estimate:
        """Estimate as `estimate` does, with the graph."""
        from moe2edge.targets._onnx_storage import make_hollow_initializers

        stored = self.stored(model)
        graph = self._build(stored)
        own = _measure(graph)
        initializers = make_hollow_initializers(graph.batches)
        size = graph.proto(initializers, _metadata(stored)).ByteSize()
        return replace(own, disk=own.disk + size + SMALL_FILES)

    def count_held(self, stored: Model) -> Callable[[str, Weight], int]:
        """Return a function that counts the bytes of a tensor in memory."""
        return lambda _, weight: weight.nbytes if weight.scheme else 4 * weight.count

    def count_cache(self, model: Model, tokens: int) -> int:
        """Count the bytes of keys and values, float32 or int8."""
        return super().count_cache(model, tokens) // (4 if self._int8_cache else 1)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write ``model.onnx``, ``model.onnx.data`` and the two configs.

        A cache in int8 has scales of one until `calibrate` sets them.

        Raises:
            Unsupported: see `accepts`.
        """
        from moe2edge.targets._onnx_storage import DATA_FILE, GRAPH_FILE, write_data

        self.accepts(model)
        model = self.stored(model)
        graph = self._build(model)
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

    def _build(self, model: Model) -> Graph:
        """Build the graph of a model that is stored."""
        from moe2edge.targets._onnx_decoder import build_decoder

        return build_decoder(model, self.accuracy_level, int8_cache=self._int8_cache)

    def calibrate(self, folder: Path, texts: Iterable[list[int]]) -> dict[str, str]:
        """Set the scales of a cache in int8 by the keys and values of texts.

        They are measured in the graph itself, with a float32 cache: so they are what its attention
        caches, behind norms and rotation, and no block runs in PyTorch again.

        Raises:
            VerificationFailed: onnxruntime refuses the graph, or a key or value is not finite.
        """
        from moe2edge.targets._onnx_cache import set_cache_scales
        from moe2edge.targets._onnx_storage import GRAPH_FILE

        return {GRAPH_FILE: set_cache_scales(folder, texts)} if self._int8_cache else {}

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

        check_graph(folder, int8_cache=self._int8_cache)
        check_genai_config(folder)

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder in ONNX Runtime; ``exact`` makes all activations float32.

        Raises:
            Unsupported: onnxruntime is missing or too old.
            VerificationFailed: onnxruntime refuses the graph.
        """
        from moe2edge.targets._onnx_runtime import open_runtime

        return open_runtime(folder, exact=exact)

    def with_whole_cache(self, folder: Path) -> Runtime | None:
        """Open a graph with a cache in float32, if that of the folder is int8."""
        from moe2edge.targets._onnx_runtime import open_runtime

        return open_runtime(folder, whole_cache=True) if self._int8_cache else None

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open a graph that runs every chosen expert, with the weights of the folder."""
        from moe2edge.targets._onnx_runtime import open_runtime
        from moe2edge.targets._onnx_storage import load_graph

        graph = self._build(remove_skipping(self.stored(model)))
        protos = {proto.name: proto for proto in load_graph(folder).graph.initializer}
        stored = [protos[slot.name] for batch in graph.batches for slot in batch.slots]
        proto = graph.proto(stored, _metadata(model))
        return open_runtime(folder, graph=proto.SerializeToString())

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the graph."""
        return judge_loaders("onnx", model, model)


def _measure(graph: Graph) -> Estimate:
    """Return what the data of a graph takes, in its file and in memory."""
    from moe2edge.targets._onnx_storage import compute_offsets

    data = compute_offsets(graph.batches)[1]
    return Estimate(data + graph.widened_nbytes, data)


def _metadata(model: Model) -> dict[str, str]:
    """Return the metadata of the graph file that `open_runtime` reads."""
    from moe2edge.targets._onnx_storage import HALF_KEY, POSITIONS_KEY

    half = {HALF_KEY: "experts"} if _has_3_bits(model) else {}
    return {POSITIONS_KEY: str(model.family.geometry(model.config).max_positions), **half}


def _has_3_bits(model: Model) -> bool:
    return any(w.scheme and w.scheme.bits == EXPERT_BITS for _, _, w in model.tensors())


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
            rf"one of these, with {EXPERT_BITS} for experts alone (a rule {{match: 'experts\.', "
            f"bits: {EXPERT_BITS}}}, onnxruntime 1.32 or newer), or export to hf:dequantize=true"
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
    check_group_size(name, shape[1], scheme)


def _accept_end(name: str, weight: Weight) -> None:
    """Refuse a quantized head or embedding in a form that their operators do not take.

    Args:
        name: its name on disk.
        weight: the matrix.

    Raises:
        Unsupported: names the form, and those to choose instead.
    """
    scheme = weight.scheme
    assert scheme is not None
    if scheme.bits != END_BITS or not scheme.symmetric:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds a head or an embedding in {END_BITS} bits, "
            "symmetric, or unquantized: choose 8 or 16 bits for them"
        )
    _accept_scheme(name, weight.shape, scheme, {weight.shape[1]})


def _accept_3_bits(name: str, weight: Weight) -> None:
    """Refuse a matrix of an expert of 3 bits in a form that the operator does not take.

    Args:
        name: its name on disk.
        weight: the matrix.

    Raises:
        Unsupported: names the form, and those to choose instead.
    """
    scheme, groups = weight.scheme, ", ".join(map(str, EXPERT_GROUPS))
    assert scheme is not None
    if scheme.ordered or not scheme.symmetric or scheme.group_size not in EXPERT_GROUPS:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds {EXPERT_BITS} bits symmetric, in groups of "
            f"{groups}; set symmetric: true and such a group_size, choose 4 bits, or export to "
            "hf:dequantize=true"
        )
    check_group_size(name, weight.shape[1], scheme)
    if weight.kept and weight.scale_dtype != "F16":
        raise Unsupported(
            f"{name} has integers of {EXPERT_BITS} bits of the source with scales that are "
            f"{weight.scale_dtype}, and the graph holds such with float16 scales; quantize it anew "
            "in the recipe (rtn or gptq), or export to hf:dequantize=true"
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
    fused = _fused(layer)
    for n, expert in enumerate(layer.experts):
        if n not in fused and expert.gate.scheme and expert.gate.scheme.bits == EXPERT_BITS:
            raise Unsupported(
                f"block {block.index}: expert {n} is {expert.gate.scheme}, and experts with "
                "low-rank factors are not in the fused operator, which alone takes these; choose "
                f"{', '.join(map(str, GRAPH_BITS))} bits"
            )
    experts = [layer.experts[n] for n in fused]
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
