"""Decoder graph for ONNX Runtime: quantized experts in fused operators, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.block import Block, is_low_rank, is_quantizable
from moe2edge.model.edits import remove_skipping, sort_rows
from moe2edge.model.family import find_family
from moe2edge.model.hf_config import build_config
from moe2edge.model.layers import MoELayer
from moe2edge.model.model import Model, list_end_names
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.weights import Weight
from moe2edge.numerics.scheme import LOW_RANK
from moe2edge.pipeline.target import SMALL_FILES, Loader, LoaderRule, Target
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.operator_times import PhaseTimes
from moe2edge.runtime.protocol import Runtime
from moe2edge.runtime.router_choices import RouterChoices
from moe2edge.storage.text_files import read_json, write_bytes, write_json
from moe2edge.storage.tokenizer import read_stop_ids
from moe2edge.targets._loaders import judge_loaders, list_rules
from moe2edge.targets._onnx_genai import GENAI_CONFIG, build_genai_config
from moe2edge.targets._onnx_schemes import (
    EXPERT_BITS,
    GRAPH_BITS,
    accept_graph_3_bits,
    accept_graph_end,
    accept_graph_scheme,
)
from moe2edge.targets._web_layout import (
    GRAPH_FOLDER,
    OMITTED,
    accept_web_expert,
    build_web_config,
    check_web_config,
    describe_use,
    list_web_remarks,
    widen_bfloat16,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized
    from moe2edge.targets._onnx_graph import Graph

# GroupQueryAttention's rotary embedding takes head sizes that this divides, on the CPU.
HEAD_MULTIPLE = 16


@dataclass(frozen=True)
class Onnx(Target):
    """ONNX graph with external data, and ``genai_config.json`` beside it.

    Attributes:
        accuracy_level: precision of activations in quantized operators: 4 rounds them to int8,
            which is faster; 0 keeps float32, except for experts of 2 and 8 bits, whose
            activations the operator always rounds.
        kv_cache: dtype of cached keys and values: int8 takes a quarter of the memory of float32,
            with scales that are measured on the calibration text.
        layout: web: as transformers.js and onnxruntime-web on npm read it.
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
    layout: Literal["plain", "web"] = "plain"

    def __post_init__(self) -> None:
        if self.accuracy_level not in (0, 4):
            raise InputError(
                f"accuracy_level is 0 (float32 activations) or 4 (int8), not {self.accuracy_level}"
            )
        if self.kv_cache not in ("float32", "int8"):
            raise InputError(f"kv_cache is float32 or int8, not {self.kv_cache}")
        if self.layout not in ("plain", "web"):
            raise InputError(f"layout is plain or web, not {self.layout}")

    @property
    def _int8_cache(self) -> bool:
        return self.kv_cache == "int8"

    @property
    def narrow_head(self) -> bool:
        """True: a head in bfloat16 is held as float32, and takes six times as long."""
        return True

    @property
    def _web(self) -> bool:
        return self.layout == "web"

    @property
    def _verdicts(self) -> str:
        """Key of the verdicts on its folders."""
        return "onnx:layout=web" if self._web else "onnx"

    def _place(self, folder: Path) -> Path:
        """Return the folder of the graph."""
        return folder / GRAPH_FOLDER if self._web else folder

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
                accept_graph_end(name, weight)
                continue
            if not is_quantizable(role):
                raise Unsupported(
                    f"{name} is {weight.scheme}, but the graph holds this tensor in full precision "
                    f"only, and factors also as {LOW_RANK}"
                )
            if weight.scheme.bits == EXPERT_BITS and role.startswith("experts."):
                accept_graph_3_bits(name, weight)
            else:
                accept_graph_scheme(name, weight.shape, weight.scheme, widths)
        for block, layer in model.moe_blocks:
            _accept_layer(block, layer)
        if self._web:
            self._accept_web(model)
        elif _has_3_bits(model):
            from moe2edge.targets._onnx_runtime import check_3_bits

            check_3_bits()

    def _accept_web(self, model: Model) -> None:
        """Refuse what onnxruntime on npm does not run.

        Raises:
            Unsupported: names it.
        """
        if _has_3_bits(model):
            raise Unsupported(
                f"experts of {EXPERT_BITS} bits need onnxruntime 1.32 or newer, and npm has 1.30; "
                f"choose {', '.join(map(str, GRAPH_BITS))} bits, or leave layout=web out"
            )
        from moe2edge.targets._onnx_web import accept_sizes, count_data_bytes

        for name, role, weight in model.tensors():
            if role.startswith("experts."):
                accept_web_expert(name, weight)
        graph = self._build(self.stored(model))
        accept_sizes(graph.batches, count_data_bytes(graph.batches) + graph.widened_nbytes)

    def remarks(self, model: Model) -> tuple[str, ...]:
        """Say what numbers of a web folder are, and what runs it."""
        return tuple(list_web_remarks(model)) if self._web else ()

    def stored(self, model: Model) -> Model:
        """Return the model with the rows of routers in the order that ``config.json`` tells.

        A web folder has float32 in place of bfloat16.
        """
        return widen_bfloat16(sort_rows(model)) if self._web else sort_rows(model)

    def estimate(self, model: Model) -> Estimate:
        """Estimate ``model.onnx.data``, in which rotary tables are float32, and scales in part.

        In memory, what is neither quantized nor of low rank is float32 as well.
        """
        return self._measure(self._build(self.stored(model)))

    def estimate_folder(self, model: Model, folder: Path) -> Estimate:
        """Estimate as `estimate` does, with the graph."""
        from moe2edge.targets._onnx_storage import make_hollow_initializers

        stored = self.stored(model)
        graph = self._build(stored)
        own = self._measure(graph)
        initializers = make_hollow_initializers(graph.batches)
        size = graph.proto(initializers, _metadata(stored)).ByteSize()
        return replace(own, disk=own.disk + size + SMALL_FILES)

    def count_held(self, stored: Model) -> Callable[[str, Weight], int]:
        """Return a function that counts the bytes of a tensor in memory."""
        return lambda _, weight: weight.nbytes if weight.scheme else 4 * weight.count

    def count_cache(self, model: Model, tokens: int) -> int:
        """Count the bytes of keys and values, float32 or int8."""
        return super().count_cache(model, tokens) // (4 if self._int8_cache else 1)

    def _measure(self, graph: Graph) -> Estimate:
        """Return what the data of a graph takes, in its files and in memory."""
        from moe2edge.targets._onnx_storage import compute_offsets
        from moe2edge.targets._onnx_web import count_data_bytes

        count = count_data_bytes if self._web else lambda batches: compute_offsets(batches)[1]
        data = count(graph.batches)
        return Estimate(data + graph.widened_nbytes, data)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write ``model.onnx``, ``model.onnx.data`` and the two configs.

        A cache in int8 has scales of one until `calibrate` sets them.

        Raises:
            Unsupported: see `accepts`.
        """
        from moe2edge.targets._onnx_storage import DATA_FILE, GRAPH_FILE, write_data
        from moe2edge.targets._onnx_web import write_web_data

        self.accepts(model)
        model = self.stored(model)
        graph = self._build(model)
        if self._web:
            initializers, digests = write_web_data(graph.batches, folder)
        else:
            initializers, data = write_data(graph.batches, folder / DATA_FILE)
            digests = {DATA_FILE: data}
        content = graph.proto(initializers, _metadata(model)).SerializeToString(deterministic=True)
        path = self._place(folder) / GRAPH_FILE
        digests[path.relative_to(folder).as_posix()] = write_bytes(path, content)
        config = build_config(model)
        named = add_older_spellings(config)
        if self._web:
            named = build_web_config(named, len(digests) - 1)
        else:
            genai = build_genai_config(config, read_stop_ids(folder, config))
            digests[GENAI_CONFIG] = write_json(folder / GENAI_CONFIG, genai)
        return digests | {"config.json": write_json(folder / "config.json", named)}

    def _build(self, model: Model) -> Graph:
        """Build the graph of a model that is stored."""
        from moe2edge.targets._onnx_decoder import build_decoder

        return build_decoder(
            model,
            self.accuracy_level,
            int8_cache=self._int8_cache,
            omitted=OMITTED if self._web else (),
        )

    def calibrate(self, folder: Path, texts: Iterable[list[int]]) -> dict[str, str]:
        """Set the scales of a cache in int8 by the keys and values of texts.

        They are measured in the graph itself, with a float32 cache: so they are what its attention
        caches, behind norms and rotation, and no block runs in PyTorch again.

        Raises:
            VerificationFailed: onnxruntime refuses the graph, or a key or value is not finite.
        """
        from moe2edge.targets._onnx_cache import set_cache_scales
        from moe2edge.targets._onnx_storage import GRAPH_FILE

        if not self._int8_cache:
            return {}
        place = self._place(folder)
        name = (place / GRAPH_FILE).relative_to(folder).as_posix()
        return {name: set_cache_scales(place, texts)}

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read every tensor back from the initializers of the graph, one by one.

        Raises:
            VerificationFailed: the files are damaged.
        """
        from moe2edge.targets._onnx_storage import read_tensors

        return read_tensors(self._place(folder))

    def check_derived(self, folder: Path) -> None:
        """Compare rotary tables, attention operators and ``genai_config.json`` with the config.

        Raises:
            VerificationFailed: names the table, the operator or the key.
        """
        from moe2edge.targets._onnx_checks import check_genai_config, check_graph

        place = self._place(folder)
        check_graph(folder, place, int8_cache=self._int8_cache)
        if self._web:
            check_web_config(read_json(folder / "config.json"), place)
        else:
            check_genai_config(folder)

    def check_installed(self, folder: Path) -> None:
        """Refuse a folder that the installed onnxruntime does not run.

        Raises:
            Unsupported: it is missing or too old.
        """
        from moe2edge.targets._onnx_runtime import check_onnxruntime

        check_onnxruntime(self._place(folder))

    def outline(self, folder: Path) -> Model:
        """Return the model of a folder with the shapes and bytes that its graph has.

        Raises:
            VerificationFailed: the graph is damaged, or lacks a tensor of the config.
        """
        from moe2edge.targets._onnx_outline import outline_graph

        return outline_graph(folder, self._place(folder))

    def profile_operators(
        self, folder: Path, ids: Sequence[int], gen_tokens: int
    ) -> tuple[PhaseTimes, ...] | None:
        """Run a text with the profiler of ONNX Runtime."""
        from moe2edge.targets._onnx_profiler import profile_graph

        return profile_graph(self._place(folder), ids, gen_tokens)

    def list_router_choices(
        self, folder: Path, ids: Sequence[int]
    ) -> Mapping[int, RouterChoices] | None:
        """List the rows of routers that the tokens of a text choose, in the graph itself."""
        from moe2edge.targets._onnx_profiler import list_router_choices

        return list_router_choices(folder, self._place(folder), ids)

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder in ONNX Runtime; ``exact`` makes all activations float32.

        Raises:
            Unsupported: onnxruntime is missing or too old.
            VerificationFailed: onnxruntime refuses the graph.
        """
        from moe2edge.targets._onnx_runtime import open_runtime

        return open_runtime(self._place(folder), exact=exact)

    def reopen_elsewhere(self, folder: Path) -> Runtime | None:
        """Open a web folder in onnxruntime-web, by Node.

        Raises:
            Unsupported: Node or the package is missing or too old.
            VerificationFailed: onnxruntime-web refuses the graph.
        """
        if not self._web:
            return None
        from moe2edge.targets._web_runtime import WebRuntime

        config = read_json(folder / "config.json")
        positions = find_family(config).geometry(config).max_positions
        return WebRuntime(self._place(folder), positions)

    def with_whole_cache(self, folder: Path) -> Runtime | None:
        """Open a graph with a cache in float32, if that of the folder is int8."""
        from moe2edge.targets._onnx_runtime import open_runtime

        place = self._place(folder)
        return open_runtime(place, whole_cache=True) if self._int8_cache else None

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open a graph that runs every chosen expert, with the weights of the folder."""
        from moe2edge.targets._onnx_runtime import open_runtime
        from moe2edge.targets._onnx_storage import load_graph

        graph = self._build(remove_skipping(self.stored(model)))
        place = self._place(folder)
        protos = {proto.name: proto for proto in load_graph(place).graph.initializer}
        stored = [protos[slot.name] for batch in graph.batches for slot in batch.slots]
        proto = graph.proto(stored, _metadata(model))
        return open_runtime(place, graph=proto.SerializeToString())

    def describe_use(self, model: Model) -> str:
        """Return JavaScript that runs a web folder."""
        return describe_use(model.family.model_type) if self._web else ""

    def rules(self) -> tuple[LoaderRule, ...]:
        """List all verdicts on programs with their conditions."""
        return list_rules("onnx:layout=web", "layout=web") + list_rules("onnx")

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the graph."""
        return judge_loaders(self._verdicts, model, model, asdict(self))


def _metadata(model: Model) -> dict[str, str]:
    """Return the metadata of the graph file that `open_runtime` reads."""
    from moe2edge.targets._onnx_storage import HALF_KEY, POSITIONS_KEY

    half = {HALF_KEY: "experts"} if _has_3_bits(model) else {}
    return {POSITIONS_KEY: str(model.family.geometry(model.config).max_positions), **half}


def _has_3_bits(model: Model) -> bool:
    return any(w.scheme and w.scheme.bits == EXPERT_BITS for _, _, w in model.tensors())


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
