"""Contract of targets: they say what they can hold, write it, and reopen it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from moe2edge.model.cached_numbers import list_cached
from moe2edge.model.family import Family
from moe2edge.model.model import Model
from moe2edge.model.weights import DTYPE_BYTES, DTYPES, Weight
from moe2edge.runtime.memory import IMPORTED, Estimate
from moe2edge.runtime.operator_times import PhaseTimes
from moe2edge.runtime.protocol import Runtime
from moe2edge.runtime.router_choices import RouterChoices

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.numerics.grid import Quantized

# Bytes of configs beside the weights, about.
SMALL_FILES = 1500
# Bytes of a number, by its dtype as torch names it.
DTYPE_WIDTHS = {DTYPES[spelled]: width for spelled, width in DTYPE_BYTES.items()}
Verdict = Literal["yes", "as read", "not tried", "no"]
# Words for verdicts in reports and cards, where they differ from those in files.
VERDICT_WORDS: Mapping[Verdict, str] = {"as read": "by source inspection, not run"}


@dataclass(frozen=True)
class Loader:
    """A program that may load an output, with a verdict and its evidence.

    Attributes:
        program: its name.
        verdict: ``yes``: it was run on such an output; ``as read``: its code takes it, but it was
            not run; ``not tried``; ``no``: it refuses such an output or misreads it.
        note: version, condition, reason and evidence, as a sentence.
        version: version that was run or read; empty: not recorded, or of no importance.
        script: what was run, whose output is beside it; empty: nothing was.
        command: shell line that runs the output, in its folder; empty: there is none.
        snippet: the same in Python.
    """

    program: str
    verdict: Verdict
    note: str
    version: str = ""
    script: str = ""
    command: str = ""
    snippet: str = ""

    @property
    def text(self) -> str:
        """Verdict and note for the report and the card."""
        # A note that begins with a version is that number alone, which would read like a score.
        note = f"version {self.note}" if self.note[:1].isdigit() else self.note
        return f"{VERDICT_WORDS.get(self.verdict, self.verdict)} ({note})"


@dataclass(frozen=True)
class LoaderRule:
    """A verdict with its condition; of several rules on a program the first that applies holds.

    Attributes:
        loader: the verdict; its note may speak of outputs in general.
        when: which outputs it is for; empty: all others.
    """

    loader: Loader
    when: str


def get_target_name(file: str) -> str:
    """Return the name of the target in a file, by the name of its module.

    >>> get_target_name("compressed_tensors")
    'compressed-tensors'
    """
    return file.replace("_", "-")


@dataclass(frozen=True)
class Target:
    """One kind of output: a subclass in its own file in ``targets/``, named after the file.

    Attributes:
        name: the name of its file, with hyphens for underscores.
        summary: one line for ``moe2edge targets``.
        streams: whether its folders can be read as models, see `streamed`.
        chooses_as_torch: whether its runtime chooses the same of two experts with equal scores.
        libraries: modules that its runtime imports; the profiler imports them before it times
            the loading of a folder.
        limits: what its outputs cannot do, for their cards; empty if there is nothing to say.
        card_library: library of the hub that loads its outputs, for their cards.
        card_program: the program in the verdicts that stands for it; empty: of the same name.
        any_family: whether it holds families of which only the numbers of experts are known.
        holds_tokenizer: whether its files hold the tokenizer in a form of their own, so that
            `check_companions` has something to look at.
        runtime_nbytes: memory of a process with its runtime, and no model, measured.
        beside_nbytes: memory of a process that the runtime starts, without the model; part of
            ``runtime_nbytes``.
        cache_nbytes: bytes of a cached key or value; 0: as in `find_dtype`.
        forgets: whether its runtime forgets tokens that no window of attention sees any more.
        loads_by_transformers: whether stock transformers loads layers of equal size.
        logits_rows: most tokens of a prompt whose logits are in memory at once.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    streams: ClassVar[bool] = False
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    chooses_as_torch: ClassVar[bool] = True
    limits: ClassVar[str] = ""
    card_library: ClassVar[str] = "transformers"
    card_program: ClassVar[str] = ""
    any_family: ClassVar[bool] = False
    holds_tokenizer: ClassVar[bool] = False
    runtime_nbytes: ClassVar[int] = IMPORTED
    beside_nbytes: ClassVar[int] = 0
    cache_nbytes: ClassVar[int] = 0
    forgets: ClassVar[bool] = True
    loads_by_transformers: ClassVar[bool] = False
    logits_rows: ClassVar[int] = 1

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = get_target_name(cls.__module__.rpartition(".")[2])

    def supports(self, family: Family) -> bool:
        """Return whether it holds models of a family; which of them, `accepts` says."""
        return self.any_family or not family.generic

    def accepts(self, model: Model) -> None:
        """Refuse, from shapes alone, a model that this target could not hold.

        Raises:
            Unsupported: with what it cannot hold, and which target could.
        """
        raise NotImplementedError

    def check_companions(self, folder: Path, model: Model) -> tuple[str, ...]:
        """Refuse files beside the weights, above all a tokenizer, that the output could not hold.

        Args:
            folder: holds them as outputs get them.
            model: the planned model.

        Returns:
            What a user should know of them.

        Raises:
            Unsupported: names what it cannot hold.
        """
        return ()

    def remarks(self, model: Model) -> tuple[str, ...]:
        """List what a user should know of an output of ``model``, for the log and the card."""
        return ()

    def check_runtime(self, model: Model) -> None:
        """Refuse to begin where the runtime that verifies an output is missing, or refuses it.

        Args:
            model: what will be written, of which only shapes are known.

        Raises:
            Unsupported: with the command that installs it, or with what it refuses.
        """

    def settle(self, model: Model, largest: float) -> Target:
        """Return the target with the options that depend on how large activations are.

        Args:
            model: what is written.
            largest: its largest absolute activation on the evaluation text.

        Raises:
            Unsupported: an option that was given does not hold such activations.
        """
        return self

    def stored(self, model: Model) -> Model:
        """Return the model whose tensors are written for ``model``: it computes the same.

        It differs where the format cannot hold a layer as it is, but can hold an equal one; or
        where it holds dequantized numbers only, which its dtype may round.

        Raises:
            Unsupported: as `accepts`.
        """
        return model

    def find_dtype(self, model: Model) -> str:
        """Return the dtype, as torch names it, that an output of ``model`` runs in as shipped."""
        return "float32"

    def estimate(self, model: Model) -> Estimate:
        """Estimate what the output takes: weight files, and memory once reopened, as shipped."""
        return Estimate(model.nbytes, model.nbytes)

    def estimate_folder(self, model: Model, folder: Path) -> Estimate:
        """Estimate as `estimate` does, with all files that `write` writes.

        Args:
            model: the planned model.
            folder: holds the source's companions, which metadata may be made of.
        """
        own = self.estimate(model)
        return replace(own, disk=own.disk + SMALL_FILES)

    def count_held(self, stored: Model) -> Callable[[str, Weight], int]:
        """Return a function that counts the bytes that its runtime reads of a tensor.

        Args:
            stored: the model that is `stored`, whose tensors have the names on disk.
        """
        return lambda _, weight: weight.nbytes

    def count_droppable(self, model: Model) -> int:
        """Count the bytes of `estimate` that the system takes back when memory runs short.

        They are pages of files of which the runtime holds copies of its own.
        """
        return 0

    def count_mapped(self, model: Model) -> int:
        """Count the bytes of files that stay mapped beside `estimate`, and can be taken back."""
        return 0

    def count_cache(self, model: Model, tokens: int) -> int:
        """Count the bytes of what its runtime remembers of a text."""
        width = self.cache_nbytes or DTYPE_WIDTHS[self.find_dtype(model)]
        cached = list_cached(model)
        numbers = sum(one.count(tokens, windows=self.forgets) for one in cached)
        return width * numbers + 4 * sum(one.state for one in cached)

    def write(self, model: Model, folder: Path) -> dict[str, str]:
        """Write weights and config into a folder, tensor by tensor.

        The folder holds nothing but the source's companions (tokenizer, generation config).

        Returns:
            By the name of each file, the SHA-256 of the bytes that were to be written, as the
            functions in `storage` return it. A file that is left out is not held against it.
        """
        raise NotImplementedError

    @property
    def narrow_head(self) -> bool:
        """True if outputs hold a head in 8 bits, which is then what passes make of it."""
        return False

    @property
    def reads_calibration(self) -> bool:
        """True if an output holds numbers that `calibrate` measures on the calibration text."""
        return False

    def calibrate(self, folder: Path, texts: Iterable[list[int]]) -> dict[str, str]:
        """Set, in a folder that was written, the numbers that are measured on text.

        Args:
            folder: what `write` wrote, with other numbers in their place.
            texts: the tokens of each sample of the calibration text.

        Returns:
            Digests of the files that it changed, as those of `write`.
        """
        return {}

    def tensors(self, folder: Path) -> Iterator[tuple[str, Tensor | Quantized]]:
        """Read everything back: each tensor by its name on disk, as integers where quantized.

        The names are those of `Model.tensors` of what is `stored`, so that an audit can hold one
        against the other. A target that does not read its folders as models has a way of its own.

        Raises:
            InputError: parts of a tensor are missing or do not fit.
            VerificationFailed: a file is damaged, a tensor is missing, unexpected or of another
                shape, or parts hold what the target does not write.
        """
        model = self.streamed(folder)
        assert model is not None, f"target {self.name} reads no models and yields no tensors"
        for name, _, weight in model.tensors():
            yield name, weight.load() if weight.scheme is None else weight.quantized()

    def check_derived(self, folder: Path) -> None:
        """Compare tables and configs of a folder with the files that they derive from.

        `tensors` does not yield them, and a short text in the runtime does not need all of them.

        Raises:
            VerificationFailed: names the file, and the key or the table.
        """

    def streamed(self, folder: Path) -> Model | None:
        """Return the folder as a model, block by block; None if only its runtime reads it."""
        return None

    def check_installed(self, folder: Path) -> None:
        """Refuse, before any work, a folder whose runtime is not installed, or too old for it.

        Raises:
            Unsupported: with the command that installs it.
        """

    def outline(self, folder: Path) -> Model:
        """Return the folder as a model of which shapes and bytes count; no number is read.

        Raises:
            VerificationFailed: the files are damaged, or not those of the config.
        """
        model = self.streamed(folder)
        assert model is not None, f"target {self.name} reads no models and has no outline"
        return model

    def profile_operators(
        self, folder: Path, ids: Sequence[int], gen_tokens: int
    ) -> tuple[PhaseTimes, ...] | None:
        """Run a prompt and a greedy continuation with the profiler of the runtime.

        Args:
            folder: the output.
            ids: the prompt.
            gen_tokens: tokens to generate, at least two.

        Returns:
            The operators of prefill and decode; None: the runtime has no profiler of operators.
        """
        return None

    def list_router_choices(
        self, folder: Path, ids: Sequence[int]
    ) -> Mapping[int, RouterChoices] | None:
        """List the rows of routers that the tokens of a text choose, by the block's index.

        None: the folder is read as a model, which is walked over in PyTorch.
        """
        return None

    def reopen(self, folder: Path, *, exact: bool = False) -> Runtime:
        """Open the folder in its runtime; ``exact`` asks for float32 activations throughout."""
        raise NotImplementedError

    def with_whole_cache(self, folder: Path) -> Runtime | None:
        """Open the folder as `reopen` does, but with keys and values cached without rounding.

        None if `reopen` caches them so.
        """
        return None

    def reopen_elsewhere(self, folder: Path) -> Runtime | None:
        """Open the folder in the program that it is for, where `reopen` takes another one.

        None if `reopen` takes that program.

        Raises:
            Unsupported: it is not installed; with the command that installs it.
            VerificationFailed: it refuses the folder.
        """
        return None

    def describe_use(self, model: Model) -> str:
        """Return JavaScript that runs an output of ``model``, for its card, if there is some."""
        return ""

    def without_skipping(self, model: Model, folder: Path) -> Runtime:
        """Open the folder as `reopen` does, but with every chosen expert run; for timing.

        Args:
            model: what was written, with dynamic skipping.
            folder: where it was written.
        """
        raise NotImplementedError

    def loaders(self, model: Model) -> tuple[Loader, ...]:
        """List the programs that may load the output, with verdicts."""
        raise NotImplementedError

    def rules(self) -> tuple[LoaderRule, ...]:
        """List all verdicts on programs with their conditions, for ``moe2edge targets NAME``."""
        return ()
