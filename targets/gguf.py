"""One file for llama.cpp, ollama and LM Studio: ``model.gguf``, with the integers of the solve.

Symmetric 4 bits in groups of 32 or a multiple are Q4_0, 8 bits Q8_0, 2 bits in groups of 64 Q2_0:
the same integers and scales. Asymmetric 4 bits are Q4_1, whose minimum is rounded to float16.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from moe2edge.errors import VerificationFailed
from moe2edge.model.build import build_model
from moe2edge.model.cached_numbers import list_cached
from moe2edge.model.family import Family, find_family
from moe2edge.model.hf_config import build_transformers_dict
from moe2edge.model.model import Model
from moe2edge.model.older_spellings import add_older_spellings
from moe2edge.model.weights import Weight
from moe2edge.pipeline.target import SMALL_FILES, Loader, LoaderRule, Target
from moe2edge.runtime.memory import Estimate
from moe2edge.runtime.protocol import MOST_PLACED, Runtime
from moe2edge.storage.text_files import read_json, write_json
from moe2edge.storage.tokenizer import TOKENIZER, read_stop_ids
from moe2edge.targets import _gguf_model
from moe2edge.targets._gguf_file import GgufFile, build_header, read_gguf, write_gguf
from moe2edge.targets._gguf_forms import HeldTensor, find_places, make_blank, plan_file
from moe2edge.targets._gguf_layouts import LAYOUTS_BY_FAMILY
from moe2edge.targets._gguf_tokenizer import (
    build_tokenizer,
    check_outline,
    has_loose_apostrophes,
)
from moe2edge.targets._loaders import judge_loaders, list_rules

MODEL_FILE = "model.gguf"


@dataclass(frozen=True)
class Gguf(Target):
    """One file for llama.cpp.

    Attributes:
        dequantize: write quantized weights as plain numbers, in the source's dtype.
    """

    summary: ClassVar[str] = "one GGUF file for llama.cpp, ollama and LM Studio"
    streams: ClassVar[bool] = True
    any_family: ClassVar[bool] = True
    chooses_as_torch: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    holds_tokenizer: ClassVar[bool] = True
    runtime_nbytes: ClassVar[int] = 292_000_000
    beside_nbytes: ClassVar[int] = 55_000_000
    card_library: ClassVar[str] = "gguf"
    card_program: ClassVar[str] = "llama.cpp"
    dequantize: bool = False

    def supports(self, family: Family) -> bool:
        """Return whether the logits of llama.cpp were compared for a family."""
        return family.model_type in LAYOUTS_BY_FAMILY

    @property
    def narrow_head(self) -> bool:
        """True if integers are written: a head in 8 bits is `Q8_0`."""
        return not self.dequantize

    def accepts(self, model: Model) -> None:
        """Refuse what llama.cpp does not compute, or what no type holds.

        Raises:
            Unsupported: names it, and what to choose instead.
        """
        _gguf_model.plan(self.stored(model))

    def stored(self, model: Model) -> Model:
        """Return the model with every tensor in the scheme or dtype of its type."""
        return _gguf_model.store(model, dequantized=self.dequantize)

    def estimate(self, model: Model) -> Estimate:
        """Estimate the file, and in memory the file and what llama.cpp copies of it."""
        held = plan_file(_gguf_model.plan(self.stored(model)))
        size = sum(one.nbytes for one in held)
        copied = sum(one.nbytes for one in held if one.kind.repacked)
        return Estimate(
            size + copied, size + len(build_header({"general.architecture": "x"}, held))
        )

    def estimate_folder(self, model: Model, folder: Path) -> Estimate:
        """Estimate as `estimate` does, with metadata and tokenizer in the header."""
        stored = self.stored(model)
        held = _gguf_model.plan(stored)
        metadata = _build_metadata(stored, held, folder, _build_config(stored))
        planned = plan_file(held)
        bare = len(build_header({"general.architecture": "x"}, planned))
        more = len(build_header(metadata, planned)) - bare
        own = self.estimate(model)
        return replace(own, disk=own.disk + more + SMALL_FILES)

    def count_droppable(self, model: Model) -> int:
        """Count what llama.cpp copies: it does not read the file there again."""
        held = plan_file(_gguf_model.plan(self.stored(model)))
        return sum(one.nbytes for one in held if one.kind.repacked)

    def count_cache(self, model: Model, tokens: int) -> int:
        """Count the bytes of keys and values, or of what latent attention makes them of."""
        cached = list_cached(model)
        numbers = sum(one.count(tokens, latent=True, windows=False) for one in cached)
        return 2 * numbers + 4 * sum(one.state for one in cached)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write ``model.gguf`` and a config that says the same, one matrix in memory at a time.

        Raises:
            Unsupported: see `accepts`.
            VerificationFailed: a scale is not exact in float16.
        """
        stored = self.stored(model)
        held, config = _gguf_model.plan(stored), _build_config(stored)
        metadata = _build_metadata(stored, held, folder, config)
        return {
            "config.json": write_json(folder / "config.json", config),
            MODEL_FILE: write_gguf(folder / MODEL_FILE, metadata, plan_file(held)),
        }

    def check_companions(self, folder: Path, model: Model) -> tuple[str, ...]:
        """Let llama.cpp open a file without numbers, and encode texts with its tokenizer.

        Raises:
            Unsupported: it refuses the file, has no such tokenizer, or encodes a text otherwise
                than transformers.
        """
        stored = self.stored(model)
        held, config = _gguf_model.plan(stored), _build_config(stored)
        metadata = _build_metadata(stored, held, folder, config)
        stop, planned = read_stop_ids(folder, config), plan_file(held)
        left = check_outline(folder, metadata, stop, tensors=planned)
        if metadata["tokenizer.ggml.model"] == "none":
            return ("there is no tokenizer, so the file is for programs that give token ids",)
        return tuple(_list_tokenizer_remarks(folder, left))

    def remarks(self, model: Model) -> tuple[str, ...]:
        """Say what the types of the file mean for its size, its numbers and its memory."""
        stored = self.stored(model)
        return tuple(_gguf_model.list_remarks(model, stored, _gguf_model.plan(stored)))

    def check_derived(self, folder: Path) -> None:
        """Compare the metadata of the file with the config and the tokenizer beside it.

        Raises:
            VerificationFailed: names the key.
        """
        file = read_gguf(folder / MODEL_FILE)
        model = _open_model(folder, file)
        config = read_json(folder / "config.json")
        expected = _build_metadata(model, _gguf_model.plan(model), folder, config)
        found = {k: v for k, v in file.metadata.items() if not k.startswith(_gguf_model.ABOUT)}
        for key in sorted({*expected, *found}):
            if not _are_same(found.get(key), expected.get(key)):
                raise VerificationFailed(
                    f"{MODEL_FILE} has another {key} than its config and tokenizer; export it again"
                )

    def streamed(self, folder: Path) -> Model:
        """Open the folder as a model.

        Raises:
            VerificationFailed: the file is damaged, or its tensors are not those of the config.
        """
        return _open_model(folder, read_gguf(folder / MODEL_FILE))

    def check_installed(self, folder: Path) -> None:
        """Refuse to open a file without llama.cpp.

        Raises:
            Unsupported: xllamacpp is not installed.
        """
        from moe2edge.targets._gguf_runtime import check_llama

        check_llama()

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Run the file in llama.cpp; ``exact``: a file of the same numbers in float32.

        Where llama.cpp rounds the table of the rotary embedding, which no dtype changes, ``exact``
        runs the numbers of the file in PyTorch.

        Raises:
            Unsupported: xllamacpp is missing, or of a version that is not known.
            VerificationFailed: llama.cpp refuses the file.
        """
        import torch

        from moe2edge.runtime.load import build_transformers_model
        from moe2edge.runtime.torch_runtime import TorchRuntime
        from moe2edge.targets._gguf_runtime import GgufRuntime, PlacedGgufRuntime

        path, temporary = folder / MODEL_FILE, None
        file = read_gguf(path)
        config = read_json(folder / "config.json")
        positions = int(config.get("max_position_embeddings") or 1 << 20)
        if exact and _gguf_model.rounds_ramp(model := _open_model(folder, file)):
            return TorchRuntime(build_transformers_model(_gguf_model.widen(model), torch.float32))
        if exact:
            temporary = Path(tempfile.mkdtemp(prefix="moe2edge-"))
            path = temporary / MODEL_FILE
            wide = _gguf_model.widen(model)
            write_gguf(path, file.metadata, plan_file(_gguf_model.plan(wide)))
        windows = "sliding_attention" in (config.get("layer_types") or ())
        placed = positions <= MOST_PLACED and not windows
        kind = PlacedGgufRuntime if placed else GgufRuntime
        return kind(path, positions, exact=exact, temporary=temporary)

    def rules(self) -> tuple[LoaderRule, ...]:
        """List all verdicts on programs with their conditions."""
        return list_rules("gguf")

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """Return the verdict on each program that may load the file."""
        return judge_loaders("gguf", model, self.stored(model))


def _build_config(model: Model) -> dict[str, Any]:
    """Build a config that says what the file says, also to programs that look there first."""
    return add_older_spellings(build_transformers_dict(model))


def _build_metadata(
    model: Model, held: list[HeldTensor], folder: Path, config: dict[str, Any]
) -> dict[str, Any]:
    found = _gguf_model.build_metadata(model, held)
    return found | build_tokenizer(folder, model.vocabulary, config)


def _list_tokenizer_remarks(folder: Path, left: list[int]) -> Iterator[str]:
    if has_loose_apostrophes(read_json(folder / TOKENIZER)):
        yield (
            "words behind an apostrophe ('tis) are cut by llama.cpp otherwise than by this "
            "tokenizer; all else is the same"
        )
    if left:
        yield f"tokens {left} end a text, but llama.cpp does not stop at them: give them to it"


def _are_same(found: Any, expected: Any) -> bool:
    """Compare a value of a file, whose numbers have 32 bits, with what it was made of."""
    if isinstance(expected, float) and isinstance(found, float):
        return struct.pack("<f", found) == struct.pack("<f", expected)
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return all(map(_are_same, found, expected))
    return type(found) is type(expected) and bool(found == expected)


def _open_model(folder: Path, file: GgufFile) -> Model:
    """Return the model that a file and the config beside it describe.

    Raises:
        VerificationFailed: the file has other tensors than the config asks for.
    """
    config = read_json(folder / "config.json")

    model = build_model(find_family(config), config, make_blank)
    layout = _gguf_model.find_layout(model)
    places = find_places(
        model,
        lambda block: layout.forms(model.config, block),
        _gguf_model.get_rest_forms(layout, model),
    )
    known = {held for place in places.values() for held in place.names}
    if unknown := file.tensors.keys() - known:
        raise VerificationFailed(
            f"{file.path} has {len(unknown)} tensors that its config does not ask for, such as "
            f"{min(unknown)}; export it again"
        )

    def find(name: str, weight: Weight) -> Weight:
        return places[name].make_weight(file, name, weight.shape)

    for block in model.blocks:
        new = {role: find(model.disk_name(block, role), w) for role, w in block.weights()}
        model = model.replace_block(block.with_weights(new))
    rest = {name: find(model.names.get_rest_name(name), w) for name, w in model.rest.items()}
    return replace(model, rest=rest)
