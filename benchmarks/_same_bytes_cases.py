"""The recipes that `same_bytes.py` exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Passes = list[dict[str, Any]]

CALIBRATION = ("calibration.samples=8", "calibration.length=128")
EVALUATION = ("evaluation.samples=2", "evaluation.length=64")
TRAINING = ("training.samples=24", "training.length=64")
FEW_STEPS = ("recover.steps=4", "recover.batch=4", "recover.held_out=4", "recover.eval_every=2")
RECOVER = {"steps": 4, "batch": 4, "held_out": 4, "eval_every": 2}
# Options of targets, tried with a result whose layers differ in size.
OPTIONS = (
    "onnx:accuracy_level=0", "gptq:layout=uniform", "gptq:layout=mlp-only", "hf:dequantize=true",
    "hf:dequantize=true:layout=natural", "hf:dequantize=true:layout=mlp-only",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A recipe, and the targets that it is exported to.

    Attributes:
        name: of the case.
        passes: the recipe; None: the bundled recipe of that name.
        held: targets that hold the result, exported together. If one of them refuses in OLD, each
            is exported by itself.
        alone: targets that are exported to by themselves, most of which refuse.
        settings: ``--set`` of the recipe.
        flags: further options of the command.
    """

    name: str
    passes: Passes | None = None
    held: tuple[str, ...] = ("onnx", "gptq")
    alone: tuple[str, ...] = ("hf",)
    settings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


BUNDLED_SETTINGS = {
    "lightmoe": (*FEW_STEPS, *TRAINING),
    **{f"{kind}-awq": ("awq.steps=4",) for kind in "ble"},
}
PLAIN_RECIPES = ("as-is", "trim")

DROP: Passes = [{"expert_drop": {"keep": 0.75, "criterion": "reap"}}]
# Passes that leave unquantized numbers.
TRIMMING: dict[str, Passes] = {
    "merge ream, recover": [
        {"expert_merge": {"method": "ream", "keep": 0.5}},
        {"recover": RECOVER},
    ],
    "merge m-smoe, recover": [
        {"expert_merge": {"method": "m-smoe", "keep": 0.5, "routing": "members"}},
        {"recover": {**RECOVER, "loss": "distill"}},
    ],
    "merge hc-smoe": [{"expert_merge": {"method": "hc-smoe", "keep": 0.5}}],
    "expert_skip": [{"expert_skip": {}}],
    "expert_search": [{"expert_search": {"keep": 0.75, "progressive": True, "tokens": 512}}],
    "expert_search beam": [{"expert_search": {"keep": 0.5, "method": "beam", "tokens": 512}}],
    "expert_budget": [{"expert_budget": {"keep": 0.75}}],
    "expert_budget kl": [
        {"expert_budget": {"keep": 0.75, "sensitivity": "kl", "points": 3, "tokens": 256}}
    ],
    "layer_drop norm": [{"layer_drop": {"drop": 1, "norm": False}}],
    "block_drop": [{"block_drop": {"drop": 2, "consecutive": True}}],
    "routing": [*DROP, {"routing": {"rounds": 2}}],
    "sparsify wanda": [{"sparsify": {}}],
    "sparsify sparsegpt": [{"sparsify": {"method": "sparsegpt", "pattern": "2:4"}}],
    "replace constant": [{"expert_replace": {"with": "constant", "keep": 0.5}}],
    "replace linear": [{"expert_replace": {"with": "linear", "keep": 0.5, "rank": 8}}],
    "replace linear budget": [{"expert_replace": {"with": "linear", "budget": 0.6}}],
    "replace svd": [{"expert_replace": {"with": "svd", "budget": 0.6}}],
    "replace base": [{"expert_replace": {"with": "base", "budget": 0.6}}],
    "LoRA": [*DROP, {"recover": {**RECOVER, "train": "lora", "lora_rank": 4}}],
    "apply_decisions": [{"apply_decisions": {"file": "sets.json"}}],
}
QUANTIZING: dict[str, Passes] = {
    "awq": [{"awq": {"steps": 4}}],
    "gptq mixed bits": [
        {"gptq": {"group_size": 64, "rules": [{"match": "self_attn", "bits": 8}]}},
    ],
    "rtn 2 bits": [{"rtn": {"bits": 2, "group_size": 64}}],
}


def make_cases(bundled: Sequence[str]) -> Iterator[Case]:
    """Yield every case."""
    for name in bundled:
        own = BUNDLED_SETTINGS.get(name, ())
        if name in PLAIN_RECIPES:
            yield Case(name, held=("onnx", "hf"), alone=("gptq",), settings=own)
        else:
            yield Case(name, settings=own, alone=("hf",))
    for name, passes in TRIMMING.items():
        own = TRAINING if any("recover" in step for step in passes) else ()
        yield Case(name, passes, ("onnx", "hf:layout=natural"), ("gptq",), own)
        yield Case(f"{name}, rtn", [*passes, {"rtn": {}}], settings=own, alone=())
    for name, passes in QUANTIZING.items():
        yield Case(name, passes)
    uneven: Passes = [{"expert_budget": {"keep": 0.75}}, {"layer_drop": {"drop": 1}}, {"rtn": {}}]
    yield Case("uneven, rtn", uneven, alone=("hf", *OPTIONS))
    merged = TRIMMING["merge m-smoe, recover"][:1]
    yield Case("merge m-smoe, whole", merged, ("onnx", "hf"), (), flags=("--materialize",))
