"""The built-in model in a target: greedy text in float32, and agreement as it is shipped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

import moe2edge
from moe2edge.calibration.builtin_texts import find_builtin_file
from moe2edge.runtime.generation import generate

SETTINGS = ["gptq.group_size=32", "evaluation.samples=2"]
SAMPLES, LENGTH = 4, 511
PROMPT = "def read_json(path):\n"


def export(target: str, folder: Path) -> None:
    """Export the built-in model with recipe w4 in groups of 32."""
    moe2edge.export("builtin:tiny-moe", moe2edge.parse_recipe("w4", SETTINGS), target, folder)


def describe(folder: Path, exact: Any, others: dict[str, Any], shipped: dict[str, Any]) -> None:
    """Print what runtimes of a folder agree on.

    Args:
        folder: an output.
        exact: its runtime in float32, which all are compared with.
        others: further runtimes in float32, by name; greedy text of 64 tokens is compared.
        shipped: runtimes as they are used, by name; the most likely tokens are compared.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(PROMPT).ids
    expected = list(generate(exact, prompt, max_tokens=64))
    for name, runtime in others.items():
        same = list(generate(runtime, prompt, max_tokens=64)) == expected
        print(f"built-in model, {name}: greedy text of 64 tokens {'equal' if same else 'DIFFERS'}")
    text = find_builtin_file("builtin", "evaluation")
    assert text is not None
    ids = torch.tensor(tokenizer.encode(text.read_text()).ids[: SAMPLES * LENGTH])
    rows = ids.view(SAMPLES, LENGTH)
    wanted = [exact.logits(row[None])[0] for row in rows]
    for name, runtime in shipped.items():
        found = [runtime.logits(row[None])[0] for row in rows]
        agreement, error = compare(torch.cat(found), torch.cat(wanted))
        print(
            f"built-in model, {name}: top-1 agreement {agreement:.1%}, mean relative error "
            f"{error:.2%} ({ids.numel()} tokens)"
        )


def compare(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """Return top-1 agreement and mean relative error of logits [tokens, vocabulary]."""
    same = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    return float(same), float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).mean())
