"""Every key of transformers' config classes: what it does there, and here.

The sweep sets keys of our families and of all other Mixture-of-Experts families, one after the
other, to values made from the classes. Each config is either accepted, with the logits of stock
transformers, or refused; a value that changes nothing there is refused only as `KEPT_OUT` says, by
key and value.
"""

from __future__ import annotations

import copy
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig
from transformers.utils import logging

from helpers import compute_logits
from moe2edge.errors import InputError, Unsupported
from moe2edge.model.config_keys import FIXED, OTHER_FAMILIES, RUN
from moe2edge.model.config_parser import parse_config
from moe2edge.model.family import FAMILIES, ROPE_KEYS
from moe2edge.model.hf_config import build_transformers_dict
from moe2edge.storage.checkpoint import Checkpoint
from moe2edge.testing import make_checkpoint

IDS = torch.randint(1, 96, (1, 24), generator=torch.Generator().manual_seed(3))
Config = dict[str, Any]


# ---- every key is known ------------------------------------------------------------------------


# Judged with the blocks, where the row does not read them.
LAYER_KEYS = ("layer_types", "sliding_window")


def list_known(family: str) -> set[str]:
    """Return all keys of which the tables say what they do."""
    return {*FAMILIES[family].known_keys, *FIXED, *OTHER_FAMILIES, *RUN, *ROPE_KEYS, *LAYER_KEYS}


# Read only by a class that has them as fields, or to check other values.
HARMLESS = {
    "embed_dim",  # compared with num_heads
    "mlp_layer_types",  # checked for names
    "mtp_layer_types",  # old names are replaced
    "num_heads",
    "vision_aspect_ratio",  # handed to the attention function, which takes any keyword
    "vision_feature_layer",
}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_field_of_transformers_class_is_known(family: str) -> None:
    kind = CONFIG_MAPPING[family]
    keys = {field.name for field in fields(kind)} | set(kind.attribute_map)
    assert not keys - list_known(family)
    assert FAMILIES[family].reads <= keys | {"head_dim", *kind.attribute_map.values()}


def trace_names(folder: Path) -> set[str]:
    """Return all names that transformers reads of a config while it loads a model and generates."""
    read: set[str] = set()
    plain = PreTrainedConfig.__getattribute__

    def note(self: PreTrainedConfig, key: str) -> Any:
        read.add(key)
        return plain(self, key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PreTrainedConfig, "__getattribute__", note)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.generate(IDS, max_new_tokens=2, do_sample=False)
    return {key for key in read if not callable(getattr(PreTrainedConfig, key, None))}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_name_that_transformers_reads_is_known(tmp_path: Path, family: str) -> None:
    read = trace_names(make_checkpoint(tmp_path / "m", family))
    parts = {key for key in read if hasattr(CONFIG_MAPPING[family], key) or "__" in key}
    generation = set(GenerationConfig._get_default_generation_params())
    private = {"_heterogeneity_spec", "_post_init_done", "_rope_type_labels"}
    known = list_known(family) | parts | generation | private | HARMLESS
    assert "hidden_size" in read
    assert not read - known


# ---- the sweep ---------------------------------------------------------------------------------

SIZES: Config = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8,
}  # fmt: skip
# A second start for each family, in which the switches that it has are on.
SWITCHED: dict[str, Config] = {
    "mixtral": {"sliding_window": 5},
    "olmoe": {"clip_qkv": 0.5, "norm_topk_prob": True},
    "qwen2_moe": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 5, "norm_topk_prob": True},
}
# Keys that no config class has as fields, and that transformers or some config on the hub knows.
FURTHER = [
    "rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings",
    "is_causal", "_attn_implementation", "attn_implementation", "experts_implementation",
    "torch_dtype", "text_config", "decoder", "generator", "text_encoder", "per_layer_config",
    "quantization_config", "transformers_weights", "auto_map", "configuration_files",
    "attention_chunk_size", "kv_sharing_modes", "num_labels", "torchscript", "layer_types",
    "gradient_checkpointing", "output_attentions", "name_or_path", "use_return_dict",
    "validate", "to_dict", "attribute_map", "default_theta", "__class__", "_heterogeneity_spec",
    "temperature", "top_k", "mlp_layer_types", "num_heads", "embed_dim", "vision_feature_layer",
    "vision_feature_select_strategy", "fusion_config", "scoring_func", "use_qk_norm",
    "routed_scaling_factor", "logits_scaling", "query_pre_attn_scalar", "unknown",
]  # fmt: skip
COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
)  # fmt: skip
LAYERS = (
    ["full_attention"] * 2, ["sliding_attention"] * 2, ["full_attention", "sliding_attention"],
    ["attention"] * 2, ["chunked_attention"] * 2, ["full_attention"], ["sparse"] * 2,
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPES: tuple[Config, ...] = (
    {}, {"rope_theta": 1e4}, {"rope_theta": 10000}, {"rope_type": "default", "rope_theta": 1e6},
    {"type": "default"}, {"rope_type": "default", "factor": 3.0}, {"rope_theta": 5e5, "other": 1},
    {"type": "linear", "factor": 2.0}, {"rope_type": "linear", "factor": 1},
    {"type": "linear"}, {"type": "linear", "factor": 0.0}, {"type": "linear", "factor": -1.0},
    {"type": "linear", "factor": 2.0, "rope_type": "default"}, {"type": "dynamic", "factor": 2.0},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 1.0},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": None},
    {"partial_rotary_factor": 0.5}, {"partial_rotary_factor": None}, {"rope_type": "proportional"},
    YARN, {"type": "yarn", "factor": 2.0}, YARN | {"factor": None}, YARN | {"factor": "x"},
    YARN | {"attention_factor": None, "mscale": 1.0, "mscale_all_dim": 0.5},
    YARN | {"attention_factor": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    YARN | {"attention_factor": "x"}, YARN | {"beta_fast": "x"}, YARN | {"mscale": "x"},
    YARN | {"original_max_position_embeddings": 0}, YARN | {"rope_theta": 1.0},
    LLAMA3, LLAMA3 | {"high_freq_factor": 1.0}, LLAMA3 | {"low_freq_factor": 0},
    {"rope_type": "longrope"}, {"rope_type": "mrope", "mrope_section": [1, 1]},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4},
    {"rope_type": None}, {"rope_type": 3}, {"rope_type": ["x"]}, {"rope_theta": None},
    {"rope_theta": "x"}, {"rope_theta": -1.0}, {"rope_theta": 0},
    {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
)  # fmt: skip


Judge = Callable[[Any], bool]


@dataclass(frozen=True)
class KeptOut:
    """Values that stock transformers takes without a change of its logits, and that we refuse.

    Attributes:
        keys: the keys; ``*`` for all.
        holds: says which of their values; any other has to be accepted.
        reason: why they are refused.
        families: families in which they are; ``*`` for all.
    """

    keys: str
    holds: Judge
    reason: str
    families: str = "*"

    def covers(self, family: str, key: str, value: Any) -> bool:
        """Return whether a value of a key is refused for this reason."""
        names = ((family, self.families), (key, self.keys))
        here = all(listed == "*" or name in listed.split() for name, listed in names)
        return here and self.holds(value)


def other_than(*values: Any) -> Judge:
    """Return what holds for all values but some; None stands for a key that is not there."""
    return lambda value: value is not None and value not in values


def has_rope_types(*types: str) -> Judge:
    """Return what holds for settings of a rope of some types."""
    return lambda value: (
        isinstance(value, dict) and value.get("rope_type", value.get("type")) in types
    )


def _is_no_number(value: Any) -> bool:
    text = json.dumps(value)
    large = isinstance(value, int) and abs(value) >= 2**63
    return large or any(word in text for word in ("NaN", "Infinity"))


def _names_two_types(rope: Any) -> bool:
    return isinstance(rope, dict) and {"type", "rope_type"} <= rope.keys()


def _turns_a_part(rope: Any) -> bool:
    return isinstance(rope, dict) and rope.get("partial_rotary_factor") not in (None, 1)


NOT_APPLIED = "the config asks for a computation that transformers' class leaves out"
TWICE = "spelled twice and not alike: programs disagree which one counts"
KEPT_OUT = (
    KeptOut("*", _is_no_number, "not finite, or more than 64 bits: other readers of JSON fail"),
    KeptOut(
        "default_theta validate",
        lambda value: True,
        "a part of transformers' class: what a setting of that name replaces is not ours to know",
    ),
    KeptOut(
        "attribute_map",
        other_than(),
        "the same; this class has no names in it that could get lost",
        "mixtral qwen2_moe",
    ),
    KeptOut(
        "embedding_multiplier logits_scaling residual_multiplier routed_scaling_factor",
        other_than(1),
        NOT_APPLIED,
    ),
    KeptOut("attention_multiplier", other_than(SIZES["head_dim"] ** -0.5), NOT_APPLIED),
    KeptOut("query_pre_attn_scalar", other_than(SIZES["head_dim"]), NOT_APPLIED),
    KeptOut("final_logit_softcapping", other_than(0), NOT_APPLIED),
    KeptOut("clip_qkv", other_than(), NOT_APPLIED, "mixtral qwen2_moe qwen3_moe"),
    KeptOut("n_group topk_group", other_than(0, 1), NOT_APPLIED),
    KeptOut("scoring_func", other_than("softmax"), NOT_APPLIED),
    KeptOut("use_qk_norm", other_than(False), NOT_APPLIED, "mixtral qwen2_moe"),
    KeptOut(
        "attention_chunk_size kv_sharing_modes",
        other_than(),
        "followed by the cache, not by the mask: texts and steps differ",
    ),
    KeptOut(
        "layer_types",
        lambda value: isinstance(value, list) and len(value) == SIZES["num_hidden_layers"],
        "the same: this class masks all layers alike, whatever their types",
        "mixtral qwen3_moe",
    ),
    KeptOut(
        "sliding_window",
        lambda value: isinstance(value, int) and value > 0,
        "followed by flash attention and by the cache, not by the mask",
        "olmoe",
    ),
    KeptOut("max_position_embeddings", lambda value: value < 2, "no token has a next one"),
    KeptOut(
        "output_attentions output_hidden_states output_router_logits use_cache",
        lambda value: isinstance(value, str | dict | float),
        "a switch: true or false",
    ),
    KeptOut("torch_dtype", other_than("bfloat16", "float32"), TWICE),
    KeptOut("head_dim", lambda value: value == 0, "a size: must be positive", "mixtral"),
    KeptOut("num_experts", lambda value: type(value) is int and value != 6, TWICE, "qwen3_moe"),
    KeptOut("rope_theta", other_than(1e4, 1e6), TWICE),
    KeptOut("rope_scaling", other_than({}, {"type": "default"}, {"rope_type": "default"}), TWICE),
    KeptOut("rope_parameters", _names_two_types, TWICE),
    KeptOut(
        "rope_parameters",
        has_rope_types("dynamic", "longrope", "proportional"),
        "a rope that no row of the table carries out, though on this text it is the default",
    ),
    KeptOut(
        "rope_parameters",
        lambda value: isinstance(value, dict) and "full_attention" in value,
        "a rope for each kind of layer, of which this class ignores all",
        "mixtral olmoe qwen3_moe",
    ),
    KeptOut(
        "rope_parameters",
        _turns_a_part,
        "a part of a head is to be rotated: transformers' default rope ignores it, the others fail",
    ),
    KeptOut(
        "partial_rotary_factor",
        other_than(1),
        "a part of a head is to be rotated: transformers' default rope ignores it, the others fail",
    ),
    KeptOut("is_encoder_decoder", bool, "another model"),
    KeptOut("text_encoder", other_than(), "another model"),
    KeptOut("configuration_files", other_than([]), "other files may take the place of this one"),
    KeptOut(
        "attention_bias",
        lambda value: value is True,
        "tensors are missing; transformers makes them up, as zeros",
        "olmoe qwen3_moe",
    ),
)


def find_reasons(family: str, key: str, value: Any) -> list[KeptOut]:
    """Find what the list says on a value that is refused; nothing: it must not be."""
    return [one for one in KEPT_OUT if one.covers(family, key, value)]


@pytest.mark.parametrize(
    ("family", "key", "refused", "judged"),
    [
        ("mixtral", "clip_qkv", 0, None),
        ("mixtral", "embedding_multiplier", 0, 1),
        ("mixtral", "final_logit_softcapping", 30.0, 0),
        ("olmoe", "attention_bias", True, False),
        ("olmoe", "sliding_window", 128, None),
        ("qwen2_moe", "rope_parameters", {"partial_rotary_factor": 0.5}, {"rope_theta": 1e4}),
        ("qwen2_moe", "is_encoder_decoder", 2, False),
        ("qwen3_moe", "num_experts", 128, 6),
        ("qwen3_moe", "head_dim", float("nan"), 0),
        ("qwen3_moe", "unknown", 2**64, "x"),
    ],
)
def test_the_list_says_which_values_of_a_key_are_refused(
    family: str, key: str, refused: Any, judged: Any
) -> None:
    assert find_reasons(family, key, refused)
    assert not find_reasons(family, key, judged)


def make_values(key: str, defaults: list[Any]) -> list[Any]:
    """Return values of a key: defaults of the classes, their neighbours, and other types."""
    found: list[Any] = [None, True, False, 0, 1, 2, -1, 0.5, "x", [], [0], {"a": 1}, *defaults]
    for one in defaults[:2]:
        if type(one) in (int, float):
            found += [one + 1, one - 1, one * 2, one / 2, -one, float(one), str(one)]
            found += [one // 2] if isinstance(one, int) else []
    found += [10**30, 1e30, float("nan"), {"__float__": "Infinity"}]
    if "implementation" in key:
        found += [
            "eager",
            "sdpa",
            "flash_attention_2",
            "flex_attention",
            "grouped_mm",
            "batched_mm",
        ]
    found += LAYERS if "layer" in key else []
    found += ROPES if "rope" in key else []
    found += ["silu", "swish", "gelu", "softmax"] if "act" in key or "func" in key else []
    return list({repr(value): value for value in found}.values())


def list_defaults(kinds: list[Any]) -> dict[str, list[Any]]:
    """Return the defaults of each field of config classes that JSON holds."""
    found: dict[str, list[Any]] = {}
    for field in (field for kind in kinds for field in fields(kind)):
        known = found.setdefault(field.name, [])
        default = None if field.default is MISSING else field.default
        if isinstance(default, int | float | str | list) and repr(default) not in map(repr, known):
            known.append(default)
    return found


class Sweep:
    """Compares stock transformers with moe2edge on one family's tensors, and counts.

    Runs that read the same values are shared: for stock by all names that it reads, for moe2edge by
    the keys of the row.
    """

    def __init__(self, folder: Path, family: str, changes: Config) -> None:
        make_checkpoint(folder, family, **SIZES, **changes)
        tensors = load_file(folder / "model.safetensors")
        # With a head equal to its table of embeddings, a model is the same tied and untied.
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        self.folder, self.family = folder, FAMILIES[family]
        self.config: Config = json.loads((folder / "config.json").read_text())
        if changes:  # older configs have none, and `rope_scaling` in its place
            del self.config["rope_parameters"]
        self.names = trace_names(folder) - {"name_or_path", "_name_or_path", "torch_dtype"}
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.used: set[KeptOut] = set()
        self._theirs: dict[str, Tensor | Exception] = {}
        self._ours: dict[str, tuple[Tensor, Config]] = {}
        plain = self.run_stock(self.config)
        assert isinstance(plain, Tensor)
        self.plain = plain

    def run_stock(self, config: Config) -> Tensor | Exception:
        """Return stock transformers' logits for the folder with this config; what it raises."""
        try:
            read = CONFIG_MAPPING[self.family.model_type].from_dict(copy.deepcopy(config))
            state = str({name: repr(getattr(read, name, MISSING)) for name in sorted(self.names)})
        except Exception as error:  # whatever it raises: it refuses
            return error
        if state not in self._theirs:
            self._theirs[state] = self._load_stock(config)
        return self._theirs[state]

    def _load_stock(self, config: Config) -> Tensor | Exception:
        (self.folder / "config.json").write_text(json.dumps(config))
        try:
            model = AutoModelForCausalLM.from_pretrained(
                self.folder, dtype=torch.float32, attn_implementation="eager"
            )
            with torch.no_grad():
                logits: Tensor = model.eval()(IDS, return_dict=True).logits
        except Exception as error:
            return error
        return logits

    def run_ours(self, config: Config) -> tuple[Tensor, Config]:
        """Return the logits of our walk, and the config of an output."""
        parsed = parse_config(self.family, config)
        keys = self.family.reads | set(self.family.experts_key) | ROPE_KEYS
        state = repr({key: parsed.get(key) for key in sorted(keys)})
        if state not in self._ours:
            model = Checkpoint("m", self.folder, None, config).model
            self._ours[state] = compute_logits(model, IDS), build_transformers_dict(model)
        return self._ours[state]

    def compare(self, key: str, value: Any) -> None:
        """Compare both on the config in which ``key`` has ``value``."""
        config = json.loads(json.dumps({**self.config, key: value}))
        where = f"{self.family.model_type}: {key} = {value!r:.100}"
        try:
            ours, written = self.run_ours(copy.deepcopy(config))
        except (InputError, Unsupported) as error:
            self._judge_refusal(where, key, value, config, error)
            return
        theirs = self.run_stock(config)
        # A padding row outside of the table is left out of outputs, as are settings of how to run.
        ours_alone = key in RUN or key == "pad_token_id" or config.get("head_dim", 0) is None
        if isinstance(theirs, Exception) and ours_alone:
            self.counts["accepted, set or derived by us where stock fails"] += 1
            theirs = self.plain
        if isinstance(theirs, Exception):
            self.faults.append(f"{where} accepted, but stock says: {theirs!r:.200}")
            return
        for name, found in (("walk", ours), ("output", self.run_stock(written))):
            if isinstance(found, Exception) or not (found - theirs).abs().max() < 1e-4:
                self.faults.append(f"{where}: the {name} differs from stock: {found!r:.200}")
        same = torch.equal(theirs, self.plain)
        self.counts["equal" if same else "equal, with other logits"] += 1

    def _judge_refusal(
        self, where: str, key: str, value: Any, config: Config, error: Exception
    ) -> None:
        if "\n" in str(error):
            self.faults.append(f"{where} is refused in several lines: {error}")
        # A size that large never fits the tensors; nobody needs to build the model to see it.
        large = isinstance(value, int) and value > 4 * self.plain.shape[-1]
        theirs = error if large and key in self.names else self.run_stock(config)
        if isinstance(theirs, Exception):
            self.counts["refused by both"] += 1
        elif not torch.equal(theirs, self.plain):
            self.counts["refused, with other logits in stock"] += 1
        elif reasons := find_reasons(self.family.model_type, key, value):
            self.counts["refused with stock's logits the same: listed"] += 1
            self.used.update(reasons)
        else:
            self.faults.append(f"{where} refused, though it changes nothing: {error}")


def run_sweep(
    folder: Path, family: str, kinds: list[Any], further: list[str], step: int = 1
) -> Counter[str]:
    """Set each key to its values, or to each ``step``-th, with the family's switches off and on.

    With all values, each line of `KEPT_OUT` has to be of use.
    """
    logging.set_verbosity(logging.CRITICAL)  # it reports each tensor that does not fit
    counts: Counter[str] = Counter()
    unused = {one for one in KEPT_OUT if one.families == "*" or family in one.families.split()}
    for n, changes in enumerate(({}, SWITCHED.get(family, {}))):
        sweep = Sweep(folder / str(n), family, changes)
        defaults = list_defaults(kinds) | {key: [] for key in further}
        switches = sweep.family.reads | ROPE_KEYS | set(LAYER_KEYS)
        for key, values in defaults.items():
            if changes and key not in switches:
                continue
            own = [sweep.config[key]] if key in sweep.config else []
            tried = make_values(key, own + values)
            if key not in sweep.names | sweep.family.known_keys | set(further):
                tried = [None, True, 0, *values]  # nothing reads it
            for value in tried[::step]:
                sweep.compare(key, value)
        assert not sweep.faults, "\n".join(sweep.faults)
        counts += sweep.counts
        unused -= sweep.used
    assert step > 1 or not unused, unused
    sys.stdout.write(f"{family}: {sum(counts.values())} configs: {dict(counts)}\n")
    return counts


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sampled_configs_compute_what_stock_does(tmp_path: Path, family: str) -> None:
    counts = run_sweep(tmp_path, family, [], ["rope_scaling", "layer_types", "is_causal"], step=6)
    assert all(counts[kind] for kind in ("equal", "equal, with other logits", "refused by both"))


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_config_computes_what_stock_does(
    tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    """By hand with every value: ``pytest tests/test_config_keys.py -m slow --full-sweep -rP``."""
    kinds = [CONFIG_MAPPING[family], *list_moe_classes()]
    step = 1 if request.config.getoption("--full-sweep") else 48
    counts = run_sweep(tmp_path, family, kinds, FURTHER, step)
    assert sum(counts.values()) > 1000 / step


def list_moe_classes() -> list[Any]:
    """Return the config classes of all Mixture-of-Experts families of transformers."""
    found = []
    for name in CONFIG_MAPPING:
        kind = CONFIG_MAPPING[name]
        names = {field.name for field in fields(kind)} | set(kind.attribute_map)
        found += [kind] if names & set(COUNTS) else []
    assert len(found) > 30
    return found
