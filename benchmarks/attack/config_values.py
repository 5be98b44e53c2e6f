"""Give every key of a family's config values that it should not have, and see what becomes of them.

    python -m benchmarks.attack.config_values [FAMILY ...] [--common] [--every N]

A tiny random checkpoint of each family is opened with one value changed. Either it is refused in
one line when it is opened, or its logits are those of stock transformers (1e-4) with the same
config. Whatever else happens is printed as a fault, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
VALUES: tuple[Any, ...] = (0, -1, None, [], {}, "x", True, False, 10**9)
# Not a setting: the class is chosen by it.
NAMES = ("model_type",)
# Further keys: of single layers, older spellings, how to run a model, names of parts of the class.
MORE: dict[str, tuple[Any, ...]] = {
    "per_layer_config": (
        {"1": {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}},
        {"1": {"num_experts_per_tok": 1}}, {"0": {"skip": ["mlp"]}}, {"0": {"skip": ["self_attn"]}},
        {"x": {}}, {"99": {"hidden_size": 8}}, {"1": {"hidden_size": 8}}, {"1": {"unknown_key": 8}},
        {"1": 3}, {"1": {"sliding_window": 4}}, {"1": {"moe_intermediate_size": 16}}, {"1": {}},
    ),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"type": "x"}, {"rope_type": "yarn"}),
    "rope_theta": (1e6, 0.0), "rope_parameters": ({"rope_type": "linear"}, {"rope_theta": 0}),
    "attn_implementation": ("flash_attention_2", "eager"), "_attn_implementation": ("eager",),
    "experts_implementation": ("batched_mm",), "return_dict": (), "torchscript": (),
    "is_encoder_decoder": (), "is_causal": (), "to_dict": (), "get_text_config": (),
    "attribute_map": ({"hidden_size": "vocab_size"},), "validate": (), "num_layers": (),
    "_heterogeneity_spec": (), "text_config": ({"hidden_size": 8},), "layer_types": (["x"],),
    "quantization_config": ({"quant_method": "x"},), "auto_map": (), "dtype": ("float16", "nope"),
}  # fmt: skip
# Keys with which stock transformers fails in some cases and moe2edge need not: a padding token of
# the tokenizer's own, behind the table; how to run a model, which moe2edge says itself; nothing.
MORE_THAN_STOCK = {
    "pad_token_id", "attn_implementation", "_attn_implementation", "experts_implementation",
    "quantization_config", "return_dict", "text_config",
}  # fmt: skip
TOLERANCE = 1e-4
# Seconds after which opening is a fault.
LONGEST = 20


@dataclass(frozen=True)
class Source:
    """A tiny checkpoint, whose config is written anew for each case.

    Attributes:
        folder: its folder.
        config: its ``config.json``.
        kind: transformers' class.
    """

    folder: Path
    config: dict[str, Any]
    kind: Any


def make_source(folder: Path, family: str) -> Source:
    """Write a tiny checkpoint of a family."""
    from every_family import make_folder

    stock = make_folder(folder, family)
    return Source(folder, json.loads((folder / "config.json").read_text()), type(stock))


def list_keys(source: Source, *, common: bool) -> list[str]:
    """List the keys of a config: those of its class, or those that all classes have."""
    from transformers import PreTrainedConfig

    shared = set(PreTrainedConfig().to_dict())
    known = set(source.config) | set(MORE)
    return sorted((known & shared if common else known - shared) - set(NAMES))


def judge(source: Source, key: str, value: Any) -> str:
    """Open a checkpoint with a changed value.

    Returns:
        "refused", "equal", "accepted" where stock cannot build the model, or what is wrong.
    """
    from every_family import walk_over
    from moe2edge.errors import InputError, Unsupported
    from moe2edge.storage.checkpoint import open_checkpoint

    (source.folder / "config.json").write_text(json.dumps(source.config | {key: value}))
    try:
        with _limit(LONGEST):
            model = open_checkpoint(source.folder).model
    except (InputError, Unsupported) as error:
        return "refused" if len(str(error).splitlines()) == 1 else f"several lines: {error}"
    except Exception as error:
        return f"opening: {_name(error)}"
    try:
        with _limit(LONGEST):
            found = walk_over(model)
    except Exception as error:
        return f"late: {_name(error)}"
    try:
        expected = _run_stock(source)
    except Exception as error:
        return "accepted" if key in MORE_THAN_STOCK else f"only stock fails: {_name(error)}"
    return "equal" if _are_equal(found, expected) else "other logits than stock"


def _are_equal(found: Any, expected: Any) -> bool:
    import torch

    return bool(torch.allclose(found, expected, rtol=0, atol=TOLERANCE, equal_nan=True))


def _run_stock(source: Source) -> Any:
    import torch

    from every_family import run_stock

    model, report = source.kind.from_pretrained(
        source.folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if any(report.values()):
        raise ValueError(f"tensors do not fit: {report}")
    return run_stock(model.eval())


class _limit:
    """Raise an error where something takes too long."""

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds

    def __enter__(self) -> None:
        signal.signal(signal.SIGALRM, _stop)
        signal.alarm(self._seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def _stop(*_: object) -> None:
    raise TimeoutError(f"it took more than {LONGEST} seconds")


def _name(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def try_family(family: str, folder: Path, *, common: bool, every: int) -> Iterator[tuple[str, str]]:
    """Try the values of a family's keys; yield each case and what became of it."""
    source = make_source(folder, family)
    keys = list_keys(source, common=common)
    cases = [(key, value) for key in keys for value in (*VALUES, *MORE.get(key, ()))]
    for key, value in cases[::every]:
        if source.config.get(key, "") is not value:
            yield f"{family}: {key}={json.dumps(value)}", judge(source, key, value)


def main() -> None:
    """Try the families that are asked for."""
    sys.path.insert(0, str(ROOT / "tests"))
    from transformers.utils import logging

    from every_family import GENERIC

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("families", nargs="*")
    parser.add_argument("--common", action="store_true", help="keys that all families have")
    parser.add_argument("--every", type=int, default=1, help="only each Nth case")
    given = parser.parse_args()
    counts: Counter[str] = Counter()
    begun = time.time()
    for family in given.families or GENERIC:
        with tempfile.TemporaryDirectory() as folder:
            tried = try_family(family, Path(folder), common=given.common, every=given.every)
            for case, became in tried:
                fine = became in ("refused", "equal", "accepted")
                counts[became if fine else "faults"] += 1
                if not fine:
                    print(f"{case}: {became}", flush=True)
        print(f"{family}: {dict(counts)}, {time.time() - begun:.0f} s", flush=True)
    sys.exit(1 if counts["faults"] else 0)


if __name__ == "__main__":
    main()
