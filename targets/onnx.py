"""Decoder graph for ONNX Runtime: experts of few bits in fused operators, with a KV cache."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.hf_config import build_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Block, Model, is_low_rank, is_quantizable
from moe2edge.numerics.scheme import LOW_RANK, WHOLE_ROW, Scheme
from moe2edge.pipeline.target import Loader, Target
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import Runtime
from moe2edge.storage.text_files import write_json
from moe2edge.storage.tokenizer import read_stop_ids

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# What GroupQueryAttention's rotary embedding asks of a head on the CPU.
HEAD_MULTIPLE = 16
# Of QMoE and MatMulNBits: bits, and inputs per scale: a power of two, at least this.
GRAPH_BITS = (2, 4, 8)
SMALLEST_GROUP = 16
# onnxruntime-genai reserves a cache of this many tokens unless it is told otherwise.
DEFAULT_LENGTH = 4096


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX graph with external data, and ``genai_config.json`` beside it.

    Attributes:
        accuracy_level: what quantized operators may do to activations: 4 rounds them to int8,
            which is faster; 0 keeps float32, but for experts of 2 and 8 bits, whose activations
            the operator always rounds.
    """

    summary: ClassVar[str] = "decoder graph with KV cache for ONNX Runtime on a CPU"
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxruntime")
    accuracy_level: int = 4

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise InputError(
                f"accuracy_level is 0 (float32 activations) or 4 (int8), not {self.accuracy_level}"
            )

    def accepts(self, model: Model) -> None:
        """Refuse a model whose heads, schemes or experts the operators do not take.

        Raises:
            Unsupported: with what it is.
        """
        head_dim = model.family.geometry(model.config).head_dim
        if head_dim % HEAD_MULTIPLE:
            raise Unsupported(
                f"heads of size {head_dim}, but ONNX Runtime rotates multiples of {HEAD_MULTIPLE}; "
                "the targets gptq and hf hold this model"
            )
        for name, role, weight in model.tensors():
            if weight.scheme is None:
                continue
            if is_low_rank(role) and weight.scheme == LOW_RANK:
                continue
            if not is_quantizable(role):
                raise Unsupported(
                    f"{name} is {weight.scheme}; the graph holds it in full, or factors as "
                    f"{LOW_RANK}"
                )
            _accept_scheme(name, weight.shape, weight.scheme)
        for block, layer in model.moe_blocks:
            _accept_layer(block, layer)

    def estimate(self, model: Model) -> Estimate:
        """Estimate ``model.onnx.data``, in which scales and rotary tables are float32.

        In memory, what is neither quantized nor of low rank is float32 as well.
        """
        from moe2edge.targets._onnx_decoder import build_decoder
        from moe2edge.targets._onnx_storage import compute_offsets

        graph = build_decoder(model, self.accuracy_level)
        data = compute_offsets(graph.batches)[1]
        return Estimate(data + graph.widened_nbytes, data)

    def write(self, model: Model, folder: Path) -> None:
        """Write ``model.onnx``, ``model.onnx.data`` and the two configs.

        Raises:
            Unsupported: as `accepts`.
        """
        from moe2edge.targets._onnx_decoder import build_decoder
        from moe2edge.targets._onnx_storage import DATA_FILE, GRAPH_FILE, write_data

        self.accepts(model)
        graph = build_decoder(model, self.accuracy_level)
        proto = graph.proto(write_data(graph.batches, folder / DATA_FILE), _metadata(model))
        (folder / GRAPH_FILE).write_bytes(proto.SerializeToString(deterministic=True))
        config = build_config(model)
        write_json(folder / "config.json", config)
        write_json(
            folder / "genai_config.json",
            build_genai_config(model, config, read_stop_ids(folder, config)),
        )

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Every tensor that the graph holds, read back from its initializers one by one.

        Raises:
            VerificationFailed: the files are damaged.
        """
        from moe2edge.targets._onnx_storage import read_tensors

        return read_tensors(folder)

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """The folder in ONNX Runtime; ``exact`` makes activations float32 in memory.

        Raises:
            Unsupported: onnxruntime is missing or too old.
            VerificationFailed: onnxruntime refuses the graph.
        """
        from moe2edge.targets._onnx_runtime import open_runtime

        return open_runtime(folder, exact=exact)

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """A graph that runs every chosen expert, on the weights of the folder."""
        from moe2edge.model import edits
        from moe2edge.targets._onnx_decoder import build_decoder
        from moe2edge.targets._onnx_runtime import open_runtime
        from moe2edge.targets._onnx_storage import load_graph

        graph = build_decoder(edits.remove_skipping(model), self.accuracy_level)
        protos = {proto.name: proto for proto in load_graph(folder).graph.initializer}
        stored = [protos[slot.name] for batch in graph.batches for slot in batch.slots]
        proto = graph.proto(stored, _metadata(model))
        return open_runtime(folder, graph=proto.SerializeToString())

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Which programs can load the graph."""
        return (
            Loader("onnxruntime", "yes", "1.31 or newer, CPU provider"),
            _genai(model),
            Loader("onnxruntime, CUDA", "no", "QMoE takes 16-bit activations there"),
        )


def _genai(model: Model) -> Loader:
    """What is known of onnxruntime-genai, which was run with symmetric 4 bits."""
    schemes = {weight.scheme for _, _, weight in model.tensors() if weight.scheme}
    if all((scheme.bits, scheme.symmetric) == (4, True) for scheme in schemes):
        note = "0.18, run on a CPU: benchmarks/genai_reader"
        return Loader("onnxruntime-genai", "yes", note)
    note = "0.18 with this scheme; it was run with symmetric 4 bits"
    return Loader("onnxruntime-genai", "not tried", note)


def _metadata(model: Model) -> dict[str, str]:
    """What the runtime reads from the graph file besides the graph."""
    from moe2edge.targets._onnx_storage import POSITIONS_KEY

    return {POSITIONS_KEY: str(model.family.geometry(model.config).max_positions)}


def _accept_scheme(name: str, shape: tuple[int, ...], scheme: Scheme) -> None:
    """Refuse a matrix whose scheme the operators do not take, or only in a slow way.

    Raises:
        Unsupported: with what it is, and which target could hold it.
    """
    group = scheme.group_size
    if scheme.bits not in GRAPH_BITS:
        raise Unsupported(
            f"{name} is {scheme}; the graph holds {', '.join(map(str, GRAPH_BITS))} bits; choose such "
            "ones, or export to hf:dequantize=true"
        )
    if group == WHOLE_ROW:
        raise Unsupported(
            f"{name} is {scheme}, with which ONNX Runtime's experts are 10 to 25 times slower; "
            "give group_size 32, 64 or 128, or export to gptq or hf:dequantize=true"
        )
    if group < SMALLEST_GROUP or group & (group - 1):
        raise Unsupported(
            f"{name} is {scheme}; the graph holds groups of a power of two from {SMALLEST_GROUP}"
        )
    if shape[1] % group:
        raise Unsupported(f"{name} has {shape[1]} inputs, which groups of {group} do not divide")


def _accept_layer(block: Block, layer: MoELayer) -> None:
    """Refuse experts that one fused operator cannot hold.

    Raises:
        Unsupported: the router has more than its matrix, or experts differ in shape or scheme.
    """
    if layer.router.per_expert:
        raise Unsupported(
            f"block {block.index}: the router has {', '.join(sorted(layer.router.per_expert))} "
            "per expert, which ONNX Runtime's expert operators have no input for"
        )
    experts = [layer.experts[n] for n in _fused(layer)]
    forms = {(e.gate.shape, w.scheme or w.dtype) for e in experts for w in (e.gate, e.up, e.down)}
    if len(forms) > 1:
        raise Unsupported(
            f"block {block.index}: experts differ in width, dtype or scheme; one fused operator "
            "holds them all"
        )


def _fused(layer: MoELayer) -> Sequence[int]:
    """The experts of a layer that one operator holds."""
    from moe2edge.targets._onnx_columns import Columns

    plain = not layer.substitutes and not layer.members
    return range(len(layer.experts)) if plain else Columns(layer).fused


def build_genai_config(
    model: Model, config: Mapping[str, Any], ends: Collection[int]
) -> dict[str, Any]:
    """``genai_config.json`` for onnxruntime-genai, whose type "decoder" runs any such graph.

    Args:
        model: what was written.
        config: its ``config.json``.
        ends: end tokens, any of which ends a text.
    """
    geometry = model.family.geometry(config)
    ids: dict[str, Any] = {key: config.get(key) for key in ("bos_token_id", "pad_token_id")}
    if ends:
        ids["eos_token_id"] = min(ends) if len(ends) == 1 else sorted(ends)
        if ids["pad_token_id"] is None:
            ids["pad_token_id"] = min(ends)
    past, present = "past_key_values.%d", "present.%d"
    return {
        "model": {
            "type": "decoder",
            "vocab_size": geometry.vocab,
            "context_length": geometry.max_positions,
            **{key: value for key, value in ids.items() if value is not None},
            "decoder": {
                "filename": "model.onnx",
                "head_size": geometry.head_dim,
                "hidden_size": geometry.hidden,
                "num_attention_heads": geometry.heads,
                "num_key_value_heads": geometry.kv_heads,
                "num_hidden_layers": len(model.blocks),
                # The number of threads is that of the machine that runs it, so it is not set.
                "session_options": {
                    "provider_options": [],
                    "session.intra_op.allow_spinning": "1",
                },
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": f"{past}.key",
                    "past_value_names": f"{past}.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{present}.key",
                    "present_value_names": f"{present}.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "num_beams": 1,
            "max_length": min(geometry.max_positions, DEFAULT_LENGTH),
            "past_present_share_buffer": True,
        },
    }
