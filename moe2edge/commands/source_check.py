"""Prove the numbers of a source before anything is built on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moe2edge.errors import InputError
from moe2edge.model.model import EMBEDDING
from moe2edge.progress import Reporter
from moe2edge.storage.checkpoint import Checkpoint

if TYPE_CHECKING:
    from moe2edge.calibration.tokens import Tokens


def report_notes(checkpoint: Checkpoint, reporter: Reporter) -> None:
    """Report what of the files of a source was read, or not, where that may surprise."""
    for note in checkpoint.notes:
        reporter.log(f"warning: {checkpoint.source}: {note}")


def check_ids(
    checkpoint: Checkpoint, texts: Mapping[str, Tokens | None], reporter: Reporter
) -> None:
    """Refuse texts that reach rows of the embedding that are not finite; name other such rows.

    Args:
        checkpoint: the source.
        texts: the texts by their purpose.
        reporter: receives a warning.

    Raises:
        InputError: a text has the id of such a row.
    """
    import torch

    if not checkpoint.broken_ids:
        return
    broken = torch.tensor(checkpoint.broken_ids)
    for purpose, tokens in texts.items():
        if tokens is None:
            continue
        if (found := broken[torch.isin(broken, tokens.ids)]).numel():
            raise InputError(
                f"row {int(found[0])} of {EMBEDDING} holds numbers that are not finite, and the "
                f"{purpose} text has its id; the checkpoint is damaged, get it again"
            )
    shown = ", ".join(map(str, checkpoint.broken_ids[:5]))
    count = len(checkpoint.broken_ids)
    reporter.log(
        f"warning: {count} rows of {EMBEDDING} hold numbers that are not finite (ids {shown}"
        f"{', ...' if count > 5 else ''}); no text has these ids, and prompts must not have them"
    )
