"""Measure ``builtin:tiny-moe``, and an interpolated trigram model for comparison.

    python benchmarks/tiny_moe/evaluate.py            # about five minutes on two cores

Perplexity on the two texts beside the model, which are this project's code, and on modules of the
running Python's standard library that were held out of training: `evaluation`, on which training
may have been watched, and `calibration`, which training never looks at. Entropy of the routing on
the evaluation text, and how many of 20 held-out beginnings are continued with text that parses as
Python.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from corpus import Split, choose_modules, modules
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

BUILTIN = Path(__file__).parents[2] / "moe2edge" / "builtin" / "tiny-moe"
LENGTH = 512
# Characters of held-out modules, by their split.
HELD_OUT: dict[Split, int] = {"evaluation": 240_000, "calibration": 420_000}


class Trigram:
    """An interpolated Kneser-Ney trigram model with one discount of 0.75.

    Kneser and Ney, 1995; Chen and Goodman, 1998. Counts are kept as sorted keys.
    """

    def __init__(self, ids: np.ndarray, vocabulary: int, discount: float = 0.75) -> None:
        self.v, self.d = vocabulary, discount
        w = ids.astype(np.int64)
        keys = (w[:-2] * vocabulary + w[1:-1]) * vocabulary + w[2:]
        self.tri = np.unique(keys, return_counts=True)
        pairs, _ = np.unique(w[:-1] * vocabulary + w[1:], return_counts=True)
        # Lower orders count distinct left neighbours (continuations), not occurrences.
        self.bi = np.unique(self.tri[0] % vocabulary**2, return_counts=True)
        self.uni = np.bincount(pairs % vocabulary, minlength=vocabulary).astype(float)
        self.tri_context = self._contexts(self.tri)
        self.bi_context = self._contexts(self.bi)

    def _contexts(self, table: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, ...]:
        """For each context: its key, the sum of its counts, its number of continuations."""
        keys, start = np.unique(table[0] // self.v, return_index=True)
        sums = np.add.reduceat(table[1], start)
        kinds = np.diff(np.append(start, len(table[0])))
        return keys, sums, kinds

    def _interpolate(
        self,
        key: np.ndarray,
        table: tuple[np.ndarray, np.ndarray],
        contexts: tuple[np.ndarray, ...],
        lower: np.ndarray,
    ) -> np.ndarray:
        count = _lookup(key, table[0], table[1])
        total = _lookup(key // self.v, contexts[0], contexts[1])
        kinds = _lookup(key // self.v, contexts[0], contexts[2])
        safe = np.maximum(total, 1)
        mixed = np.maximum(count - self.d, 0) / safe + self.d * kinds / safe * lower
        return np.where(total > 0, mixed, lower)

    def perplexity(self, ids: np.ndarray) -> float:
        """Return the perplexity of all but the first two tokens."""
        w = ids.astype(np.int64)
        first = (self.uni[w[2:]] + self.d) / (self.uni.sum() + self.d * self.v)
        pair = w[1:-1] * self.v + w[2:]
        second = self._interpolate(pair, self.bi, self.bi_context, first)
        third = self._interpolate(w[:-2] * self.v**2 + pair, self.tri, self.tri_context, second)
        return float(np.exp(-np.log(third).mean()))


def _lookup(key: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    at = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
    return np.where(keys[at] == key, values[at], 0).astype(float)


def neural(model: torch.nn.Module, ids: np.ndarray) -> tuple[float, list[float]]:
    """Return perplexity in windows of 512 tokens, and routing entropy of each layer in bits."""
    rows = torch.from_numpy(ids[: len(ids) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    counts: list[torch.Tensor] = [torch.zeros(model.config.num_experts) for _ in model.model.layers]
    for n, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(_counter(counts[n]))
    loss = 0.0
    with torch.no_grad():
        for part in rows.split(8):
            logits = model(part).logits[:, :-1].float()
            targets = part[:, 1:].flatten()
            loss += float(cross_entropy(logits.flatten(0, 1), targets, reduction="sum"))
    entropies = []
    for count in counts:
        p = count / count.sum()
        entropies.append(float(-(p[p > 0] * p[p > 0].log2()).sum()))
    return math.exp(loss / (rows.numel() - len(rows))), entropies


def _counter(counts: torch.Tensor) -> Callable[..., None]:
    def hook(_: object, __: object, out: tuple[torch.Tensor, ...]) -> None:
        counts.add_(torch.bincount(out[2].flatten(), minlength=len(counts)))

    return hook


def beginnings(limit: int = 20) -> list[str]:
    """Return the first four lines of the first function or class of held-out modules."""
    found = []
    for module in modules():
        if module.split != "evaluation" or len(found) == limit:
            continue
        tree = ast.parse(module.text)
        lines = module.text.splitlines(keepends=True)
        for node in tree.body:
            long = (getattr(node, "end_lineno", 0) or 0) - node.lineno >= 8
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and long:
                found.append("".join(lines[node.lineno - 1 : node.lineno + 3]))
                break
    return found


def parses(text: str) -> bool:
    """Tell if text, cut at its last whole line, is Python."""
    try:
        ast.parse(text[: text.rfind("\n") + 1])
    except (SyntaxError, ValueError):
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUILTIN)
    parser.add_argument("--show", action="store_true", help="print the continuations")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()

    def encode(texts: list[str]) -> np.ndarray:
        rows = tokenizer.backend_tokenizer.encode_batch(texts)
        return np.concatenate([np.array([0, *row.ids]) for row in rows])

    corpus = modules()
    texts = {
        f"{name}.txt": (BUILTIN / f"{name}.txt").read_text("utf-8")
        for name in ("evaluation", "calibration")
    }
    texts |= {
        f"library, {split}": "\n".join(m.text for m in choose_modules(corpus, split, size))
        for split, size in HELD_OUT.items()
    }
    trigram = Trigram(
        encode([m.text for m in corpus if m.split == "train"]), model.config.vocab_size
    )
    measured = {}
    entropies: dict[str, list[float]] = {}
    for name, text in texts.items():
        ids = encode([text])
        perplexity, entropies[name] = neural(model, ids)
        measured[name] = {
            "tokens": len(ids),
            "perplexity": round(perplexity, 2),
            "trigram_perplexity": round(trigram.perplexity(ids), 2),
        }
    good = 0
    starts = beginnings()
    for start in starts:
        ids = torch.tensor([tokenizer(start, add_special_tokens=False)["input_ids"]])
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        text = tokenizer.decode(made[0], skip_special_tokens=True)
        good += parses(text)
        if args.show:
            print(f"{'parses' if parses(text) else 'does not parse'}:\n{text}\n{'-' * 60}")
    result = {
        "texts": measured,
        "routing_entropy_bits": [round(e, 2) for e in entropies["evaluation.txt"]],
        "routing_entropy_max_bits": round(math.log2(model.config.num_experts), 2),
        "beginnings_that_parse": f"{good} of {len(starts)}",
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
