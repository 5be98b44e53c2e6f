"""Measure the quality of an output folder on a text, in the runtime of its target."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moe2edge.calibration import walk
from moe2edge.calibration.mixes import list_text_files
from moe2edge.calibration.sources import AS_FLAGS, TextSource
from moe2edge.calibration.tokens import Tokens, load_tokens
from moe2edge.evaluation import verify
from moe2edge.model.config_parser import parse_config
from moe2edge.model.family import find_family
from moe2edge.model.hf_config import OUTPUT_KEYS
from moe2edge.numerics import metrics
from moe2edge.pipeline import registry
from moe2edge.progress import QUIET, Reporter
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.storage.input_files import InputFiles
from moe2edge.storage.manifest import (
    MANIFEST,
    Artifact,
    check_sizes,
    is_read_by_runtimes,
    open_artifact,
)
from moe2edge.storage.text_files import hash_file, read_json
from moe2edge.storage.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor


def evaluate_output(
    folder: Path, source: TextSource, reference: Checkpoint | None, reporter: Reporter
) -> metrics.Quality:
    """Measure perplexity, and with a reference model also KL and top-1 agreement.

    Arguments and errors are those of `evaluate_on_text`.
    """
    return evaluate_on_text(folder, source, reference, reporter)[0]


def evaluate_on_text(
    folder: Path, source: TextSource, reference: Checkpoint | None, reporter: Reporter
) -> tuple[metrics.Quality, str]:
    """Measure an output on a text; return also the digest of the text's token ids.

    Args:
        folder: an output of moe2edge.
        source: the text and how it is cut into samples.
        reference: the source; None measures perplexity only.
        reporter: receives progress.

    Raises:
        InputError: the folder is no output, the text is too short or cannot be read, or the
            reference has another vocabulary; or a file that was read has changed under way.
        Unsupported: the runtime of the output is not installed.
        VerificationFailed: a file has another size than the manifest says.
    """
    artifact = open_artifact(folder)
    check_sizes(artifact)
    target = registry.make_target(artifact.target, artifact.options)
    target.check_installed(folder)
    files = _look_at_inputs(artifact, source, reference)
    tokens, vocabulary = load_own_text(folder, source, reporter)
    ids = tokens.ids
    advance = reporter.advance
    expected = None
    if reference is not None:
        model = reference.model
        verify.check_vocabulary(model, vocabulary)
        expected = walk.compute_logits(model, walk.observe(model, ids, (), advance, "source"))
    runtime = target.reopen(folder)

    def logits() -> Iterator[Tensor]:
        for n, row in enumerate(ids):
            advance(artifact.target, n, len(ids))
            yield runtime.logits(row[None])[0]
        advance(artifact.target, len(ids), len(ids))

    quality = metrics.measure(ids, logits(), expected)
    files.check()
    return quality, tokens.sha256


def load_own_text(
    folder: Path, source: TextSource, reporter: Reporter = QUIET
) -> tuple[Tokens, int]:
    """Return a text as tokens of an output, and the size of its vocabulary.

    Raises:
        InputError: the text is too short or cannot be read.
    """
    config = read_json(folder / "config.json")
    family = find_family(config)
    own = {key: value for key, value in config.items() if key not in OUTPUT_KEYS}
    geometry = family.geometry(parse_config(family, own))
    limits = (geometry.max_positions, geometry.vocab)
    tokenizer = load_tokenizer(folder)
    tokens = load_tokens(
        source, tokenizer, "evaluation", limits, spelling=AS_FLAGS, reporter=reporter
    )
    return tokens, geometry.vocab


def _look_at_inputs(
    artifact: Artifact, source: TextSource, reference: Checkpoint | None
) -> InputFiles:
    """Look at the files of the output, the text and the reference."""
    known = {
        artifact.folder / name: entry["sha256"]
        for name, entry in artifact.files.items()
        if is_read_by_runtimes(name)
    }
    texts = list_text_files(source, "evaluation")
    # A new date of these is no change. A reference is too large to be read twice.
    known |= {path: hash_file(path) for path in (artifact.folder / MANIFEST, *texts)}
    files = set(known)
    if reference is not None:
        files |= {reference.folder / "config.json", *reference.files.values()}
    return InputFiles(sorted(files), known=known)
