"""What a message says to do works: the remedy is read out of the message, and carried out."""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest

import moe2edge
from helpers import LESS, QUIET, TEXT, check_early, refuse, run
from moe2edge.calibration.sources import TextSource
from moe2edge.cli.main import main
from moe2edge.commands.texts import load_evaluation
from moe2edge.errors import InputError
from moe2edge.pipeline import recipe, registry
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.text_files import read_yaml
from moe2edge.targets._auto_round import AUTO_ROUND_VERSION
from moe2edge.testing import Make

# ---- recipes -----------------------------------------------------------------------------------


class Try(NamedTuple):
    """An export, as far as it is checked before it works."""

    steps: list[Any]
    target: str = "onnx"
    settings: tuple[str, ...] = ()
    materialize: bool = False


class Case(NamedTuple):
    """An export that is refused, and what follows from the message: each is accepted."""

    refused: Try
    said: str
    remedies: tuple[Callable[..., Try], ...]
    family: str = "olmoe"
    changes: dict[str, Any] = {}  # noqa: RUF012  (nobody writes to it)


def one(name: str, target: str = "onnx", /, **options: Any) -> Try:
    """Return a recipe of one pass, whose option ``with`` is written ``with_``."""
    return Try([{name: {key.rstrip("_"): value for key, value in options.items()}}], target)


def share(how: str, budget: float, rank: int) -> Try:
    return one("expert_replace", ANY, with_=how, budget=budget, rank=rank)


def number(text: str) -> int:
    return int(text.replace(",", ""))


def percent(text: str) -> float:
    return float(text) / 100


ANY = "hf:layout=natural"
TOP_K = r"chooses (\d+) per token; "
CLAMP = r", or set clamp_top_k: true$"
TIE = {"with": "base", "budget": 0.6, "rank": 1}
LAYER_DROP = {"layer_drop": {"drop": 1}}
UNEVEN = {"expert_drop": {"keep": [4, 5, 5]}}
NO_ROUTER = [{"layer_drop": {"drop": 2}}, {"expert_drop": {"keep": [0]}}]

COUNTS = [
    # Counts of experts. Each family here has 6 experts in 3 layers, of which 2 are chosen.
    *(
        Case(
            one(name, ANY, keep=7),
            r"keep at most (\d+)$",
            (lambda n, p=name: one(p, ANY, keep=int(n)),),
        )
        for name in ("expert_drop", "expert_budget", "expert_search")
    ),
    Case(
        one("expert_merge", ANY, method="ream", keep=7),
        r"keep at most (\d+)$",
        (lambda n: one("expert_merge", ANY, method="ream", keep=int(n)),),
    ),
    Case(
        one("expert_replace", ANY, with_="constant", keep=7),
        r"keep at most (\d+)$",
        (lambda n: one("expert_replace", ANY, with_="constant", keep=int(n)),),
    ),
    Case(
        one("expert_drop", ANY, keep=[6, 7, 6]),
        r"keep at most (\d+)$",
        (lambda n: one("expert_drop", ANY, keep=[6, int(n), 6]),),
    ),
    Case(
        one("expert_drop", ANY, keep=[4, 7, 4]),
        r"keep at most (\d+)$",
        (lambda n: one("expert_drop", ANY, keep=[4, int(n), 4]),),
    ),
    Case(
        Try([UNEVEN, {"expert_drop": {"keep": 5}}], ANY),
        r"keep at most (\d+)$",
        (lambda n: Try([UNEVEN, {"expert_drop": {"keep": int(n)}}], ANY),),
    ),
    *(
        Case(
            one(name, keep=1),
            rf"{TOP_K}keep at least (\d+){CLAMP}",
            (
                lambda _, n, p=name: one(p, ANY, keep=int(n)),
                lambda *_, p=name: one(p, ANY, keep=1, clamp_top_k=True),
            ),
        )
        for name in ("expert_drop", "expert_search")
    ),
    Case(
        one("expert_budget", ANY, keep=1),
        rf"{TOP_K}keep at least (\d+){CLAMP}",
        (
            lambda _, n: one("expert_budget", ANY, keep=int(n)),
            # One in each layer is no choice: the next message says so.
            lambda *_: one("expert_budget", ANY, keep=2, clamp_top_k=True),
        ),
    ),
    Case(
        one("expert_budget", ANY, keep=4, floor=1),
        rf"floor 1 .*{TOP_K}set floor to at least (\d+){CLAMP}",
        (
            lambda _, n: one("expert_budget", ANY, keep=4, floor=int(n)),
            lambda *_: one("expert_budget", ANY, keep=4, floor=1, clamp_top_k=True),
        ),
    ),
    Case(
        one("expert_budget", ANY, keep=2),
        r"use (expert_drop)$",
        (lambda name: one(name, ANY, keep=2),),
    ),
    Case(
        one("expert_budget", ANY, keep=3, floor=3),
        r"use (expert_drop), or lower floor$",
        (lambda name: one(name, ANY, keep=3), lambda _: one("expert_budget", ANY, keep=3, floor=2)),
    ),
    Case(
        one("expert_budget", ANY, keep=4, floor=5),
        r"lower floor$",
        (lambda: one("expert_budget", ANY, keep=4, floor=3),),
    ),
    Case(
        one("expert_drop", ANY, keep=4, scope="global", floor=1),
        rf"floor 1 .*{TOP_K}set floor to at least (\d+){CLAMP}",
        (
            lambda _, n: one("expert_drop", ANY, keep=4, scope="global", floor=int(n)),
            lambda *_: one("expert_drop", ANY, keep=4, scope="global", floor=1, clamp_top_k=True),
        ),
    ),
    Case(
        one("expert_drop", ANY, keep=4, scope="global", floor=7),
        r"choose at most (\d+)$",
        (lambda n: one("expert_drop", ANY, keep=4, scope="global", floor=int(n)),),
    ),
    Case(
        one("expert_drop", ANY, keep=3, scope="global", floor=4),
        r"raise keep, or lower floor$",
        (
            lambda: one("expert_drop", ANY, keep=5, scope="global", floor=4),
            lambda: one("expert_drop", ANY, keep=3, scope="global", floor=3),
        ),
    ),
    Case(
        one("expert_drop", ANY, keep=1, scope="global"),
        r"raise keep, or set (clamp_top_k): (true)$",
        (
            lambda *_: one("expert_drop", ANY, keep=3, scope="global"),
            lambda key, _: one("expert_drop", ANY, keep=1, scope="global", **{key: True}),
        ),
    ),
    Case(
        one("expert_drop", ANY, keep=4, floor=2),
        r"needs (scope): (global); set it, or leave floor out$",
        (
            lambda key, value: one("expert_drop", ANY, keep=4, floor=2, **{key: value}),
            lambda *_: one("expert_drop", ANY, keep=4),
        ),
    ),
    Case(
        one("expert_drop", ANY, keep=[4, 4, 4], scope="global"),
        r"needs scope: (layer)$",
        (lambda value: one("expert_drop", ANY, keep=[4, 4, 4], scope=value),),
    ),
    Case(
        one("expert_merge", ANY, method="ream", keep=1, group_limit=5),
        rf"{TOP_K}keep at least (\d+), or set (routing): (members)$",
        (
            lambda _, n, *__: one("expert_merge", ANY, method="ream", keep=int(n), group_limit=5),
            lambda _, __, key, value: one(
                "expert_merge", ANY, method="ream", keep=1, group_limit=5, **{key: value}
            ),
        ),
    ),
    Case(
        one("expert_merge", ANY, method="ream", keep=2, group_limit=1),
        r"set group_limit to at least (\d+), or keep more$",
        (
            lambda n: one("expert_merge", ANY, method="ream", keep=2, group_limit=int(n)),
            lambda _: one("expert_merge", ANY, method="ream", keep=3, group_limit=1),
        ),
    ),
    Case(
        one("expert_merge", ANY, method="hc-smoe", keep=3, group_limit=1),
        r"group_limit is for method: (ream); set that, or leave group_limit out$",
        (
            lambda how: one("expert_merge", ANY, method=how, keep=3, group_limit=1),
            lambda _: one("expert_merge", ANY, method="hc-smoe", keep=3, routing="centroids"),
        ),
    ),
    Case(
        one("expert_search", ANY, keep=3, method="exhaustive", limit=3),
        r"tries ([\d.]+) sets, .*; raise limit, or set method: (beam)$",
        (
            lambda n, _: one("expert_search", ANY, keep=3, method="exhaustive", limit=int(n)),
            lambda _, how: one("expert_search", ANY, keep=3, method=how, limit=3),
        ),
    ),
    *(
        Case(
            one(name, ANY, drop=9),
            r"choose at least (\d+) and at most (\d+)$",
            (
                lambda low, _, p=name: one(p, ANY, drop=int(low)),
                lambda _, high, p=name: one(p, ANY, drop=int(high)),
            ),
            changes=changes,
            family=family,
        )
        for name, family, changes in (
            ("layer_drop", "olmoe", {}),
            ("block_drop", "olmoe", {}),
            ("block_drop", "qwen3_moe", {"mlp_only_layers": [0]}),
        )
    ),
    Case(
        one("block_drop", ANY, drop=1),
        r"leave (block_drop) out$",
        (lambda _: Try([], ANY),),
        changes={"num_hidden_layers": 1},
    ),
    Case(
        one("layer_drop", ANY),
        r"give drop .* or threshold",
        (lambda: one("layer_drop", ANY, drop=1), lambda: one("layer_drop", ANY, threshold=0.9)),
    ),
    Case(
        one("layer_drop", ANY, drop=1, most=1),
        r"leave most out, or give threshold in place of drop$",
        (
            lambda: one("layer_drop", ANY, drop=1),
            lambda: one("layer_drop", ANY, threshold=0.9, most=1),
        ),
    ),
]  # fmt: skip

REPLACING = [
    *(
        Case(
            one("expert_replace", ANY, with_="linear", keep=4, rank=rank),
            r"choose a rank of at most (\d+)$",
            (lambda n: one("expert_replace", ANY, with_="linear", keep=4, rank=int(n)),),
            changes=changes,
        )
        for rank, changes in ((65, {}), (60, {}), (99, {"intermediate_size": 512}))
    ),
    *(
        Case(
            one("expert_replace", ANY, with_=how, budget=0.9, rank=rank),
            r"choose a rank of at least (\d+) and at most (\d+)$",
            (
                lambda low, _, h=how: share(h, 0.95, int(low)),
                lambda _, high, h=how: share(h, 0.999, int(high)),
            ),
        )
        for how, rank in (("base", 33), ("base", 32), ("svd", 0), ("svd", 30))
    ),
    *(
        Case(
            one("expert_replace", ANY, budget=0.01, **options),
            r"take(?:s at least)? ([\d,]+)(?: at least)? \(([\d.]+)%\); raise the budget$",
            (
                lambda n, _, o=options: one("expert_replace", ANY, budget=number(n), **o),
                lambda _, part, o=options: one("expert_replace", ANY, budget=percent(part), **o),
            ),
            changes=changes,
        )
        for options in (
            {"with_": "linear"}, {"with_": "base", "rank": 1}, {"with_": "svd", "rank": 1},
        )
        for changes in ({}, {"num_hidden_layers": 2, "intermediate_size": 48})
    ),
    *(
        Case(
            one("expert_replace", ANY, budget=10**9, **options),
            r"nothing to do, lower the budget$",
            (lambda o=options: one("expert_replace", ANY, budget=0.7, **o),),
        )
        for options in ({"with_": "linear"}, {"with_": "base", "rank": 1})
    ),
    Case(
        one("expert_replace", ANY, with_="linear", budget=0.5, rank=2),
        "leave rank and criterion out$",
        (lambda: one("expert_replace", ANY, with_="linear", budget=0.5),),
    ),
    Case(
        one("expert_replace", ANY, with_="constant"),
        r"with: constant needs (keep) \(",
        (lambda key: one("expert_replace", ANY, with_="constant", **{key: 4}),),
    ),
    Case(
        one("expert_replace", ANY, with_="linear"),
        r"needs either (keep) .* or (budget)",
        (
            lambda key, _: one("expert_replace", ANY, with_="linear", **{key: 4}),
            lambda _, key: one("expert_replace", ANY, with_="linear", **{key: 0.5}),
        ),
    ),
    Case(
        Try([{"expert_replace": TIE}, {"expert_replace": {"with": "constant", "keep": 4}}], ANY),
        "use one expert_replace in a recipe",
        (lambda: Try([{"expert_replace": TIE}], ANY),),
    ),
    Case(
        Try(
            [
                {"expert_merge": {"method": "hc-smoe", "keep": 5}},
                {"expert_replace": {"with": "constant", "keep": 4}},
            ],
            ANY,
        ),
        r"and routing: (centroids) in expert_merge",
        (
            lambda routing: Try(
                [
                    {"expert_merge": {"method": "hc-smoe", "keep": 5, "routing": routing}},
                    {"expert_replace": {"with": "constant", "keep": 4}},
                ],
                ANY,
            ),
        ),
    ),
    Case(
        Try([{"expert_replace": {"with": "constant", "keep": 4}}, {"expert_replace": TIE}], ANY),
        "leave one of the two out$",
        (
            lambda: Try([{"expert_replace": TIE}], ANY),
            lambda: one("expert_replace", ANY, with_="constant", keep=4),
        ),
    ),
    *(
        Case(
            Try([{"expert_replace": {"with": "constant", "keep": 4}}, {name: options}], ANY),
            rf"put (expert_replace) or expert_merge after {name}$",
            (
                lambda later, n=name, o=options: Try(
                    [{n: o}, {later: {"with": "constant", "keep": 0.5}}], ANY
                ),
            ),
        )
        for name, options in (
            ("expert_drop", {"keep": 4}), ("expert_search", {"keep": 4}),
            ("expert_budget", {"keep": 4}), ("routing", {}),
        )
    ),
    Case(
        Try([{"expert_replace": TIE}, {"expert_merge": {"method": "ream", "keep": 4}}], ANY),
        r"use expert_merge once, before expert_replace$",
        (
            lambda: Try(
                [{"expert_merge": {"method": "ream", "keep": 4}}, {"expert_replace": TIE}], ANY
            ),
        ),
    ),
]  # fmt: skip

ORDER = [
    *(
        Case(
            Try(["expert_skip", {name: options}], ANY),
            rf"put (expert_skip) after (?:it|{name})$",
            (lambda later, n=name, o=options: Try([{n: o}, later], ANY),),
        )
        for name, options in (
            ("expert_drop", {"keep": 4}), ("expert_search", {"keep": 4}),
            ("expert_budget", {"keep": 4}), ("routing", {}),
            ("expert_merge", {"method": "ream", "keep": 4}),
        )
    ),
    Case(
        Try(["expert_skip", "expert_skip"], ANY),
        "keep one$",
        (lambda: Try(["expert_skip"], ANY),),
    ),
    *(
        Case(
            Try(["rtn", {name: options}], ANY + ":dequantize=true"),
            rf"move {name} before the pass that quantizes",
            (lambda n=name, o=options: Try([{n: o}, "rtn"], ANY + ":dequantize=true"),),
        )
        for name, options in (
            ("expert_replace", {"with": "constant", "keep": 4}),
            ("expert_merge", {"method": "ream", "keep": 4}),
        )
    ),
    Case(
        Try(["rtn", "sparsify"]),
        "comes before the pass that quantizes; move it up$",
        (lambda: Try(["sparsify", "rtn"]),),
    ),
    Case(Try(["sparsify", "sparsify"]), "keep one of its", (lambda: Try(["sparsify"]),)),
    Case(Try(["rtn", "gptq"]), "keep one of its", (lambda: Try(["rtn"]), lambda: Try(["gptq"]))),
    Case(
        Try(["rtn", "recover"]),
        r"put recover before gptq, awq, rtn and sparsify$",
        (lambda: Try(["recover", "rtn"]),),
    ),
]  # fmt: skip

TRAINING = [
    Case(
        Try(["recover"], settings=("training.samples=10",)),
        r"--set (\S+), or lower held_out or batch$",
        (
            lambda setting: Try(["recover"], settings=("training.samples=10", setting)),
            lambda _: Try(
                [{"recover": {"held_out": 4, "batch": 4}}], settings=("training.samples=10",)
            ),
        ),
    ),
    Case(
        one("recover", train="lora", lora_rank=99),
        r"choose at most (\d+)$",
        (lambda n: one("recover", train="lora", lora_rank=int(n)),),
        family="qwen3_moe",
    ),
    Case(
        one("recover", loss="distill", top_logits=999),
        r"choose at most (\d+)$",
        (lambda n: one("recover", loss="distill", top_logits=int(n)),),
    ),
    Case(one("recover", anneal=0.5), "leave it out$", (lambda: Try(["recover"]),)),
    Case(
        one("recover", tail="renormalize"),
        r"tail is for loss: (distill); set that, or leave tail out$",
        (
            lambda loss: one("recover", tail="renormalize", loss=loss),
            lambda _: Try(["recover"]),
        ),
    ),
    Case(
        Try([*NO_ROUTER, {"recover": {"train": "router"}}]),
        r"set train: (full)$",
        (lambda train: Try([*NO_ROUTER, {"recover": {"train": train}}]),),
    ),
    Case(
        Try(["rtn"], settings=("training.samples=64",)),
        r"leave it out, or add a pass that does, such as (recover)$",
        (
            lambda _: Try(["rtn"]),
            lambda name: Try([name, "rtn"], settings=("training.samples=64",)),
        ),
    ),
    *(
        Case(
            Try([step], ANY, settings=("calibration.samples=3",)),
            r"use (\d+) or more, such as --set (\S+)$",
            (
                lambda n, _, s=step: Try([s], ANY, settings=(f"calibration.samples={n}",)),
                lambda _, setting, s=step: Try([s], ANY, settings=(setting,)),
            ),
        )
        for step in ({"expert_budget": {"keep": 4}}, "routing")
    ),
    Case(
        one("expert_budget", ANY, keep=4, held_out=0.999),
        r"lower held_out, such as to ([\d.]+)$",
        (lambda n: one("expert_budget", ANY, keep=4, held_out=float(n)),),
    ),
]  # fmt: skip

ODD = {"moe_intermediate_size": 48}
QUANTIZING = [
    Case(
        one("rtn", group_size=128),
        r"choose (\d+) or (\d+) or (-1) \(one scale per row\)$",
        (
            lambda a, *_: one("rtn", group_size=int(a)),
            lambda _, b, __: one("rtn", group_size=int(b)),
            lambda *n: one("rtn", "gptq", group_size=int(n[2])),
        ),
    ),
    Case(
        one("rtn", group_size=128),
        r"choose (16) or (-1) \(one scale per row\)$",
        (
            lambda n, _: one("rtn", group_size=int(n)),
            lambda _, n: one("rtn", "gptq", group_size=int(n)),
        ),
        "qwen3_moe",
        ODD,
    ),
    Case(
        Try(["rtn"]),
        r"set group_size: (\d+) for (\w+), group_size: (-1), one scale per row, for (\w+), or a "
        r"rule that .*, such as (\{.*\})$",
        (
            lambda n, target, *_: one("rtn", target, group_size=int(n)),
            lambda *said: one("rtn", said[3], group_size=int(said[2])),
            lambda *said: one("rtn", rules=[read_yaml(said[4], "it")]),
        ),
        "qwen3_moe",
        ODD,
    ),
    Case(
        one("rtn", group_size=-1),
        r"set group_size to (\d+), leave it in 16 bits with a rule with bits: (16), or export to "
        r"(gptq) or (hf:dequantize=true)$",
        (
            lambda n, *_: one("rtn", group_size=int(n)),
            lambda _, bits, *__: one("rtn", rules=[{"match": "experts", "bits": int(bits)}]),
            lambda *said: one("rtn", said[2], group_size=-1),
            lambda *said: one("rtn", said[3], group_size=-1),
        ),
    ),
    Case(
        one("rtn", bits=3),
        r"the graph holds (\d), (\d), (\d) bits; choose one of these.*, or export to (\S+)$",
        (
            *(lambda *said, n=n: one("rtn", bits=int(said[n])) for n in range(3)),
            lambda *said: one("rtn", said[3], bits=3),
        ),
    ),
    Case(
        one("rtn", "gptq", bits=3),
        r"gptq holds (\d), (\d), (\d) bits .*; choose one of these, or export to (\S+), which",
        (
            *(lambda *said, n=n: one("rtn", "gptq", bits=int(said[n])) for n in range(3)),
            lambda *said: one("rtn", said[3], bits=3),
        ),
    ),
    Case(
        one("rtn", "gptq", group_size=16),
        r"in groups of (\d+), (\d+), (\d+), (-1) \(-1: whole rows\); choose one of these",
        (
            lambda *said: one("rtn", "gptq", group_size=int(said[2])),
            lambda *said: one("rtn", "gptq", group_size=int(said[3])),
        ),
    ),
    Case(
        one("rtn", "gptq", bits=2, group_size=-1),
        r"give it more bits, or leave it unquantized with a rule with bits: (16)$",
        (
            lambda _: one("rtn", "gptq", bits=4, group_size=-1),
            lambda n: one(
                "rtn", "gptq", bits=2, group_size=-1, rules=[{"match": "experts", "bits": int(n)}]
            ),
        ),
        "qwen3_moe",
        {"moe_intermediate_size": 40},
    ),
    Case(Try([], "gptq"), r"quantize with (\w+) or (\w+), or export to (\w+)$", (
        lambda name, *_: Try([name], "gptq"),
        lambda _, name, __: Try([name], "gptq"),
        lambda *said: Try([], said[2]),
    )),
    Case(
        Try(["rtn"], "hf"),
        r"export to ([\w-]+), .*?(\w+) or (hf:dequantize=true), which",
        tuple(lambda *said, n=n: Try(["rtn"], said[n]) for n in range(3)),
    ),
    Case(
        one("rtn", rules=[{"match": "zzz", "bits": 8}]),
        r"a name is, for example, (\S+)$",
        (lambda name: one("rtn", rules=[{"match": re.escape(name), "bits": 8}]),),
    ),
    Case(
        one("rtn", rules=[{"blocks": [7], "bits": 8}]),
        r"choose from (-\d+) to (\d+)$",
        (
            lambda low, _: one("rtn", rules=[{"blocks": [int(low)], "bits": 8}]),
            lambda _, high: one("rtn", rules=[{"blocks": [int(high)], "bits": 8}]),
        ),
    ),
    Case(
        one("rtn", rules=[{"match": "", "bits": 16}]),
        "take out a rule with bits: 16, or this pass$",
        (lambda: Try(["rtn"]), lambda: Try([])),
    ),
    Case(
        one("rtn", rules=[{"match": r"experts\.0\.", "bits": 8}]),
        "runtimes need one scheme for all experts of a layer: give them the same$",
        (lambda: one("rtn", rules=[{"match": r"experts\.", "bits": 8}]),),
    ),
    Case(
        one("rtn", factors=8),
        r"put (expert_replace) before it, or leave factors out$",
        (
            lambda name: Try([{name: TIE}, {"rtn": {"factors": 8}}]),
            lambda _: Try(["rtn"]),
        ),
    ),
    Case(
        one("sparsify", pattern="2:4", amount=0.6),
        r"leave amount out, or choose pattern (unstructured)$",
        (
            lambda _: one("sparsify", pattern="2:4"),
            lambda name: one("sparsify", pattern=name, amount=0.6),
        ),
    ),
    Case(
        one("sparsify", pattern="4:8"),
        r"choose pattern (unstructured)$",
        (lambda name: one("sparsify", pattern=name),),
        "olmoe",
        {"intermediate_size": 36},
    ),
    *(
        Case(
            one("sparsify", method=method, amount=amount),
            r"choose one between (\S+) and (\S+)$",
            (
                lambda low, _, m=method: one("sparsify", method=m, amount=float(low)),
                lambda _, high, m=method: one("sparsify", method=m, amount=float(high)),
            ),
        )
        for method in ("wanda", "magnitude", "sparsegpt")
        for amount in (1e-6, 1 - 1e-6)
    ),
]  # fmt: skip

LAYOUTS = [
    *(
        Case(
            Try(steps, "hf"),
            r"choose layout (natural) \(for moe2edge\.load\), or target (onnx)(.*)$",
            (
                lambda layout, *_, s=steps: Try(s, f"hf:layout={layout}"),
                lambda _, target, *__, s=steps: Try(s, target),
            ),
            family=family,
        )
        for family in ("olmoe", "qwen3_moe")
        for steps in (
            [{"expert_drop": {"keep": [3, 6, 2]}}], ["expert_skip"],
            [{"expert_replace": {"with": "constant", "keep": 4}}],
            [{"expert_replace": {"with": "linear", "keep": 4}}],
        )
    ),
    Case(
        Try([LAYER_DROP], "hf"),
        r"choose layout (mlp-only) or (natural) \(.*\), or target (onnx), or prune",
        (
            *(lambda *said, n=n: Try([LAYER_DROP], f"hf:layout={said[n]}") for n in (0, 1)),
            lambda *said: Try([LAYER_DROP], said[2]),
        ),
        family="qwen3_moe",
    ),
    Case(
        Try([{"expert_replace": TIE}], "hf"),
        r"choose layout (natural) .*or target (onnx); or materialize .* with --materialize:",
        (
            lambda layout, _: Try([{"expert_replace": TIE}], f"hf:layout={layout}"),
            lambda _, target: Try([{"expert_replace": TIE}], target),
            lambda *_: Try([{"expert_replace": TIE}], "hf", materialize=True),
        ),
    ),
    Case(
        Try([]),
        r"export to (\w+) or (\w+)$",
        (lambda target, _: Try(["rtn"], target), lambda _, target: Try([], target)),
        "qwen3_moe",
        {"head_dim": 24},
    ),
    Case(
        Try([], "hf"),
        r"or export to (\w+)$",
        (lambda target: Try([], target),),
        "olmoe",
        {"dtype": "float64"},
    ),
]  # fmt: skip

CASES = [*COUNTS, *REPLACING, *ORDER, *TRAINING, *QUANTIZING, *LAYOUTS]


def _name(case: Case) -> str:
    steps = json.dumps(case.refused.steps)
    return re.sub(r"[^\w.:]+", "-", f"{steps} {case.refused.target} {case.family}")[:90]


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_what_a_refusal_of_a_recipe_says_works(case: Case, tiny: Make, tmp_path: Path) -> None:
    # Long enough for the default samples of a training text.
    trains = "recover" in json.dumps(case.refused.steps) or case in TRAINING
    changes = case.changes | ({"max_position_embeddings": 512} if trains else {})
    folder, out = tiny(case.family, **changes), tmp_path / "out"
    steps, target, settings, _ = case.refused
    said = str(refuse(folder, out, steps, target, *settings)).partition("; targets that hold")[0]
    found = re.search(case.said, said)
    assert found, said
    for remedy in case.remedies:
        trial = remedy(*found.groups())
        assert trial != case.refused
        check_early(folder, out, trial.steps, trial.target, trial.settings, trial.materialize)


# ---- names -------------------------------------------------------------------------------------


@functools.cache
def list_texts() -> list[str]:
    """Return the strings of the product that are no docstrings; what is filled in is a NUL."""
    texts = []
    root = Path(moe2edge.__file__).parent
    for path in sorted([*root.rglob("*.py"), *root.parent.glob("[pt]a*s*/*.py")]):
        tree = ast.parse(path.read_text("utf-8"))
        hidden = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = [n.value if isinstance(n, ast.Constant) else "\0" for n in node.values]
                hidden |= {id(n) for n in node.values}
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and id(node) not in hidden:
                texts += [node.value] if isinstance(node.value, str) else []
    return texts


def find_names(pattern: str) -> set[str]:
    """Return what a pattern finds in the strings of the product; it must find something."""
    found = {name for text in list_texts() for name in re.findall(pattern, text)}
    assert found
    return found


def list_options(command: click.Command) -> Iterator[str]:
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from list_options(inner)


def test_options_and_commands_in_messages_exist() -> None:
    # Those of pip and npm; of vLLM, llama-server and mlx-lm, on cards.
    others = {"--help", "--version", "--upgrade", "--prefix", "--quantization", "--no-repack"}
    others |= {"--model", "--prompt"}
    # Names of colors in a style sheet look alike.
    found = find_names(r"(?<![\w-])(?<!var\()--[a-z][a-z-]+(?![a-z-]*:#)")
    assert found <= {*list_options(main), *others}
    assert find_names(r"(?:run|with|use) moe2edge ([a-z]+)\b(?! \w+ed)") <= set(main.commands)
    assert find_names(r"(?<!\w)-r ([a-z][\w-]+)") <= set(recipe.list_bundled())
    for entry in find_names(r"(?<!\w)-t ([a-z]+)\b") | find_names(r"\bhf:\w+=[\w-]+"):
        assert registry.parse_targets(entry)


def test_settings_in_messages_exist() -> None:
    sections = dict.fromkeys(("calibration", "evaluation", "training"), TextSource)
    kinds = sections | {name: registry.find_pass(name) for name in registry.list_passes()}
    for setting in find_names(r"--set ([a-z_]+\.[a-z_]+)="):
        name, _, option = setting.partition(".")
        assert option in kinds[name].model_fields, setting
    known = {option for kind in kinds.values() for option in kind.model_fields}
    names = find_names(r"\bset ([a-z_]+): ") | find_names(r"\b([a-z]+_[a-z_]+): (?:true|false)\b")
    # Keys of a rule, and of a chat of texts, are options of an inner level; one is JavaScript's.
    assert names - known <= {"device", "skip_prompt"}, names - known


def test_packages_in_messages_are_those_that_are_asked_for() -> None:
    asked = importlib.metadata.requires("moe2edge") or []
    bounds = {entry.partition(";")[0].strip() for entry in asked}
    advised = find_names(r"pip install (?:--upgrade )?'?([\w\[][^'\s;,)]*)")
    assert len(advised) > 4
    # Tokenizers of other kinds, and of later versions, need what nothing else here does, and so do
    # experts of 3 bits. A runtime whose interface is no promise is asked for in a known version, as
    # is a library whose config is written.
    others = {"sentencepiece", "tokenizers", "onnxruntime>=1.32", "xllamacpp==\0"}
    others |= {f"auto-round=={AUTO_ROUND_VERSION}"}
    assert advised - bounds <= others


def test_packages_in_documents_are_extras() -> None:
    extras = set(importlib.metadata.metadata("moe2edge").get_all("Provides-Extra") or [])
    root = Path(__file__).parent.parent
    pages = [root / "README.md", root / "CONTRIBUTING.md", *(root / "docs").glob("*.md")]
    found = [
        name
        for page in pages
        for line in re.findall(r"pip install[^'`\n]*'([^']+)'", page.read_text("utf-8"))
        for name in line.removeprefix(".[").removesuffix("]").split(",")
    ]
    assert set(found) <= extras | {"onnxruntime>=1.32"}
    assert {"cpu", "train", "parquet", "plot"} <= set(found)


# ---- commands ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "command"),
    [
        ("trimw4", ["recipe", "show", "trimw4"]),
        ("gptq.bit=4", ["recipe", "show", "w4", "--set", "gptq.bit=4"]),
        ("gptqq.bits=4", ["recipe", "show", "w4", "--set", "gptqq.bits=4"]),
        ("recpe", ["recpe", "list"]),
        ("lst", ["recipe", "lst"]),
    ],
)
def test_names_that_are_proposed_exist(wrong: str, command: list[str]) -> None:
    refused = run(*command)
    assert refused.exit_code == 2
    found = re.search(r"'([\w-]+)'.* did you mean '([\w-]+)'", refused.stderr, re.IGNORECASE)
    assert found, refused.stderr
    right = wrong.replace(found[1], found[2])
    assert right != wrong
    assert run(*(right if word == wrong else word for word in command)).exit_code == 0


def test_a_target_that_needs_a_recipe_names_one(tiny: Make, tmp_path: Path) -> None:
    folder, out = tiny("olmoe"), tmp_path / "out"
    refused = run("export", folder, "-t", "hf", "-o", out)
    found = re.search(r"such as -r (\w+),", refused.stderr)
    assert found, refused.stderr
    steps = read_yaml(recipe.find(found[1]), "it")["passes"]
    check_early(folder, out, steps, "hf", [], materialize=False)


@pytest.mark.parametrize("wrong", ["evaluation.length=4096", "evaluation.samples=4096"])
def test_sizes_of_texts_that_are_proposed_work(wrong: str, tiny: Make, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(tiny("olmoe")))
    text = tmp_path / "a.txt"
    text.write_text("abc " * 1000)
    given = [f"evaluation.text={text}", "evaluation.length=64", "evaluation.samples=4"]

    def load(*settings: str) -> None:
        load_evaluation(checkpoint, recipe.parse("passes: []", [*given, *settings]), QUIET)

    load()
    with pytest.raises(InputError) as caught:
        load(wrong)
    found = re.search(r"--set ([\w.=]+)", str(caught.value))
    assert found, caught.value
    load(wrong, found[1])


def test_decisions_are_made_as_the_messages_say(tiny: Make, tmp_path: Path) -> None:
    folder, other = tiny("olmoe"), tiny("olmoe", initializer_range=0.1)
    file, sets = tmp_path / "r.json", tmp_path / "sets.json"

    def decide(*steps: Any, more: tuple[str, ...] = ()) -> str:
        file.write_text(json.dumps({"passes": steps}))
        done = run("decide", folder, "-r", file, "-o", sets, *TEXT, *more)
        assert done.exit_code == (0 if sets.exists() and not done.stderr.count("error: ") else 2)
        return done.stderr

    drop = {"expert_drop": {"keep": 4}}
    found = re.search(r"Leave (\w+) out here, and put it after (\w+) in", decide(drop, "rtn"))
    assert found
    assert "error" not in decide(drop)
    late, early = found[1], {found[2]: {"file": str(sets)}}
    check_early(folder, tmp_path / "out", [early, late], "onnx", [], materialize=False)
    # The file exists now.
    again = re.search(r"or replace it with (--force)$", decide(drop).strip())
    assert again
    assert "error" not in decide(drop, more=(again[1],))
    # It is for one source, and for its own bytes.
    said = str(refuse(other, tmp_path / "out", [early], "onnx"))
    setting = re.search(r"run moe2edge decide for this model, or set (\w+): (true)$", said)
    assert setting, said
    steps = [{"apply_decisions": {"file": str(sets), setting[1]: True}}]
    check_early(other, tmp_path / "out", steps, "onnx", [], materialize=False)
    bound = [{"apply_decisions": {"file": str(sets), "sha256": "0" * 64}}]
    assert str(refuse(folder, tmp_path / "out", bound, "onnx")).endswith("or leave sha256 out")
    wrong = str(refuse(folder, tmp_path / "out", [drop, early], "onnx"))
    assert wrong.endswith("put apply_decisions before other pruning passes")
    check_early(folder, tmp_path / "out", [early], "onnx", [], materialize=False)


@pytest.mark.skipif(not shutil.which("iconv"), reason="needs iconv")
def test_the_command_that_converts_a_text_works(tmp_path: Path) -> None:
    from moe2edge.calibration.tokens import read_texts

    path, new = tmp_path / "a.txt", tmp_path / "b.txt"
    path.write_text("Größe\n", "utf-16")
    with pytest.raises(InputError) as caught:
        read_texts(TextSource(text=str(path)), "calibration")
    found = re.search(r"convert it: (iconv .*)$", str(caught.value))
    assert found, caught.value
    line = found[1].replace("FILE", shlex.quote(str(path))).replace("NEW", shlex.quote(str(new)))
    subprocess.run(line, shell=True, check=True)
    assert read_texts(TextSource(text=str(new)), "calibration") == ["Größe\n"]


@pytest.mark.slow
def test_what_is_said_about_outputs_works(tiny: Make, tmp_path: Path) -> None:
    folder, out = tiny("olmoe"), tmp_path / "out"
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"passes": [{"expert_drop": {"keep": 4}}]}))
    command = ["export", folder, "-r", file, "-o", out, *TEXT, *LESS]
    assert run(*command, "-t", "onnx").exit_code == 0
    again = run(*command, "-t", "onnx")
    found = re.search(
        r"exists; choose another name, or replace it with (--force)$", again.stderr.strip()
    )
    assert found, again.stderr
    with pytest.raises(InputError, match="no safetensors; run it with moe2edge generate") as caught:
        moe2edge.load(out)
    name = str(caught.value).rpartition("moe2edge ")[2]
    assert run(name, out, "abc", "-n", "2").exit_code == 0
    chats = run(name, out, "abc", "-n", "2", "--chat")
    assert chats.stderr.strip().endswith("leave --chat and --chat-template out")
    routing = run("inspect", out, "--routing")
    found_target = re.search(r"with -t (\w+) or -t (\w+) and inspect that", routing.stderr)
    assert found_target, routing.stderr
    assert run(*command, "-t", found_target[1], found[1]).exit_code == 0
    sizes = ("--length", "64", "--samples", "2")
    assert run("inspect", out, "--routing", *sizes).exit_code == 0
    (out / "config.json").write_text("{}")
    assert run("verify", out).stderr.strip().endswith("; export or download it again")
    assert run(*command, "-t", "hf", found[1]).exit_code == 0
    assert run("verify", out).exit_code == 0
