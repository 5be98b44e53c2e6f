"""Reading ``config.json``: transformers' own class parses it, then its values are judged.

Types, defaults, derived values and older spellings are those of the installed transformers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any, get_args

from moe2edge.errors import InputError, Unsupported
from moe2edge.model.config_keys import (
    ATTENTION_SCALES,
    FIXED,
    OTHER_FAMILIES,
    QK_NORMS,
    RUN,
    RUN_DROPPED,
    RUN_KEPT,
    Fixed,
)
from moe2edge.model.config_rope import check_given_rope, check_rope_table, check_same_rope
from moe2edge.model.family import CHOSEN_GROUPS, GROUP_KEYS, Config, Family, read_settings
from moe2edge.model.transformers_config import (
    check_lengths,
    check_no_part,
    explain_refusal,
    make_transformers_config,
    read_text_config,
    silence_transformers,
)

# The values of `hidden_act` that are the one function that the rows know.
SILU = ("silu", "swish")
# Types in the terms of JSON, for messages.
TYPES: Mapping[Any, str] = {
    int: "a whole number", float: "a number with a point", str: "a text", bool: "true or false",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


def parse_config(family: Family, given: Config) -> dict[str, Any]:
    """Return a config with a value for every key that the row reads, as transformers reads it.

    Keys that do nothing are kept; those that say how to run the model are left out.

    Args:
        family: the row.
        given: contents of ``config.json``.

    Raises:
        InputError: transformers refuses the config, or a value is none that a model can have.
        Unsupported: a value changes what the model computes in a way that is not supported.
    """
    _check_switches(given)
    if family.generic:
        return _read_generic(family, given)
    _check_numbers(given)
    check_given_rope(given)
    given = {key: value for key, value in given.items() if key not in RUN_DROPPED} | {
        "architectures": [family.architecture],
        "model_type": family.model_type,
    }
    if given.get("head_dim") is None:  # transformers derives it in some places, and not in others
        given.pop("head_dim", None)
    config = _build_transformers_config(family, given)
    _check_names(family, config, given)
    heads, hidden = config.num_attention_heads, config.hidden_size
    if getattr(config, "head_dim", None) is None and type(heads) is type(hidden) is int:
        config.head_dim = hidden // heads if heads > 0 else 0
    _check_sizes(family, config)
    _check_values(family, config, given)
    check_same_rope(config, given)
    check_rope_table(config, given)
    _check_windows(family, config, given)
    return _fill(family, config, given)


def _read_generic(family: Family, given: Config) -> dict[str, Any]:
    """Return all settings of the text model, as transformers reads them.

    What each of them does is left to transformers, which runs the model.
    """
    config = read_text_config(given)
    part = given.get("text_config")
    _check_generic_switches(config, part if isinstance(part, Mapping) else given)
    settings = _settle(config)
    longest = "max_position_embeddings"
    if longest in config.attribute_map:  # some call it otherwise
        settings[longest] = getattr(config, longest)
    _check_counts(family, settings)
    _check_groups(family, settings)
    return {key: value for key, value in settings.items() if key not in RUN_DROPPED}


def _settle(config: Any) -> dict[str, Any]:
    """Return the settings of transformers' config, which it reads again as they are.

    Raises:
        Unsupported: it does not.
    """
    settings = read_settings(config)
    odd: list[str] = []
    nothing: dict[str, Any] = {}
    # Where no layer differs, it writes nothing, and some classes have layers that differ then.
    for more in (nothing, {"per_layer_config": nothing}):
        given = settings | more
        again = read_settings(make_transformers_config(config.model_type, given))
        odd = sorted(key for key in again | given if again.get(key) != given.get(key))
        if not odd:
            return given
    raise Unsupported(
        f"config.json: transformers does not read {odd[0]} as it writes it, "
        f"{settings.get(odd[0])!r:.100}; a {config.model_type} with it cannot be written"
    )


def _check_generic_switches(config: Any, given: Config) -> None:
    """Refuse values of switches that transformers would not take.

    Raises:
        InputError: names the key.
    """
    from huggingface_hub.errors import StrictDataclassError

    tried = copy.copy(config)
    for key in sorted(RUN_KEPT & set(given)):
        try:
            setattr(tried, key, given[key])
        except StrictDataclassError as error:
            raise refuse(key, given[key], "true or false") from error
        except ValueError:  # attention that gives no weights is chosen by another key
            continue
    if not isinstance(given.get("is_causal"), bool | None):
        raise refuse("is_causal", given["is_causal"], "true or false")


def _check_counts(family: Family, settings: Config) -> None:
    """Refuse numbers of experts, or of chosen ones, that no layer can have.

    Raises:
        InputError: names key and value.
    """
    blocks = settings.get("num_hidden_layers")
    found = {}
    for key in (family.experts_key[0], family.top_k_key):
        value = settings[key]
        numbers = value if isinstance(value, list) else [value]
        if any(type(number) is not int or number < 1 for number in numbers):
            raise refuse(key, value, "a positive whole number, or a list with one for each layer")
        if isinstance(value, list) and len(value) != blocks:
            raise refuse(key, value, f"a list of {blocks} numbers, one for each layer")
        found[key] = numbers
    experts, chosen = found.values()
    if min(experts) < max(chosen):
        raise InputError(
            f"config.json: {family.top_k_key} is {max(chosen)}, but there are {min(experts)} "
            "experts"
        )


def _check_groups(family: Family, settings: Config) -> None:
    """Refuse groups of experts that do not divide them, or more chosen ones than there are.

    Raises:
        InputError: names key and value.
    """
    count = settings.get(family.experts_key[0])
    chosen = settings.get(CHOSEN_GROUPS)
    for key in GROUP_KEYS:
        groups = settings.get(key)
        if groups is None or not isinstance(count, int):
            continue
        if type(groups) is not int or groups < 1 or count % groups:
            raise refuse(key, groups, f"a divisor of the {count} experts")
        if chosen is not None and (type(chosen) is not int or not 1 <= chosen <= groups):
            raise refuse(CHOSEN_GROUPS, chosen, f"1 to {groups}, the number of groups")


def _fill(family: Family, config: Any, given: Config) -> dict[str, Any]:
    """Return ``given`` with transformers' values of the keys that it lacks and the row reads."""
    found = copy.deepcopy(dict(given))
    if family.window != "layer_types":
        found.pop("layer_types", None)
    spelled = {family.experts_key[0]} if set(family.experts_key) & set(given) else set()
    for key in sorted(family.reads - spelled - {"sliding_window"}):
        if found.get(key) is None and getattr(config, key, None) is not None:
            found[key] = copy.deepcopy(getattr(config, key))
    if family.window != "none" and found.get("sliding_window") is None and config.sliding_window:
        found["sliding_window"] = config.sliding_window
    if family.window == "layer_types":
        found["layer_types"] = list(config.layer_types)
    return found | {"hidden_act": "silu"}


# ---- transformers' class ---------------------------------------------------------------------


def _build_transformers_config(family: Family, given: Config) -> Any:
    """Parse a config by transformers' class of the family.

    Raises:
        InputError: it refuses the config.
    """
    from huggingface_hub.errors import StrictDataclassFieldValidationError
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family.model_type]
    given = dict(given)
    for spelling in ("dtype", "torch_dtype"):  # unlike other aliases, null is none
        if given.get(spelling, "") is None:
            given.pop(spelling)
    for alias, name in (kind.attribute_map | {"torch_dtype": "dtype"}).items():
        if alias in given and name in given and given[alias] != given[name]:
            raise InputError(
                f"config.json: {alias} is {given[alias]!r:.100} and {name} is {given[name]!r:.100}"
                "; both name the same setting: leave out the wrong one"
            )
    types = {field.name: field.type for field in fields(kind)}
    try:
        with silence_transformers():
            config = kind(**copy.deepcopy(dict(given)))
            str(config)  # transformers writes it to its log, which can fail
    except MemoryError:
        raise
    except StrictDataclassFieldValidationError as error:
        key = next((key for key in types if f"field '{key}'" in str(error)), None)
        if key is None:
            raise explain_refusal(error) from error
        raise refuse(key, given.get(key), _describe_type(types[key])) from error
    except Exception as error:  # a foreign class: any error of its own is one of the config
        raise explain_refusal(error) from error
    return config


def _describe_type(kind: Any) -> str:
    """Return the name of a type, or of each of several, in the terms of JSON."""
    kinds = get_args(kind) if len(get_args(kind)) > 1 else (kind,)
    names = (TYPES.get(getattr(one, "__origin__", None) or one, "") for one in kinds)
    return " or ".join(dict.fromkeys(filter(None, names))) or "another type"


# ---- judging values --------------------------------------------------------------------------


def refuse(key: str, value: Any, expected: str) -> InputError:
    """Make the error for a value: what was found, what was expected."""
    return InputError(f"config.json: {key} is {value!r:.100}, expected: {expected}")


def _check_switches(given: Config) -> None:
    """Refuse values of switches with which the output could not be run.

    Raises:
        InputError: names the key.
    """
    for key in sorted(RUN_KEPT & set(given)):
        if isinstance(given[key], str | Mapping | float):
            raise refuse(key, given[key], "true or false")


def _check_numbers(given: Config) -> None:
    """Refuse numbers that are not finite or need more than 64 bits, wherever they are.

    Raises:
        InputError: names the key.
    """
    check_lengths(given)
    left: list[tuple[str, Any]] = [(str(key), value) for key, value in given.items()]
    while left:
        key, value = left.pop()
        if isinstance(value, Mapping):
            tagged = set(value) == {"__float__"}  # how transformers writes NaN and infinities
            left += [(key if tagged else f"{key}.{name}", one) for name, one in value.items()]
            value = math.nan if tagged else None
        elif isinstance(value, list):
            left += [(key, one) for one in value]
        if isinstance(value, float) and not math.isfinite(value):
            raise refuse(key, value, "a finite number")


def _check_names(family: Family, config: Any, given: Config) -> None:
    """Refuse names that are no settings, and settings that nobody knows.

    Raises:
        Unsupported: names the key.
    """
    kind = type(config)
    known = family.known_keys | RUN | set(FIXED) | set(OTHER_FAMILIES) | {"layer_types"}
    known |= set(kind.attribute_map)
    own = {field.name: field for field in fields(kind)}
    check_no_part(kind, given, known | set(own))
    ignored = {"intermediate_size", "max_window_layers", "sliding_window", "use_sliding_window"}
    for key in sorted(set(own) - known - ignored):
        default = None if own[key].default is MISSING else own[key].default
        if getattr(config, key, default) != default:
            raise Unsupported(
                f"config.json: {key} is {getattr(config, key)!r:.100}, a setting of this version "
                f"of transformers that moe2edge does not know; supported is {default!r}"
            )


def parse_whole_number(config: Config, key: str) -> int:
    """Return a positive whole number of a config.

    Raises:
        InputError: it is missing, or something else.
    """
    value = config.get(key)
    if type(value) is not int or value <= 0:
        raise InputError(
            f"config.json: {key} must be a positive whole number, found {value!r:.100}"
        )
    return value


def _check_sizes(family: Family, config: Any) -> None:
    """Refuse sizes that are no sizes, or contradict each other.

    Raises:
        InputError: names key and value.
    """
    keys = [
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size",
        "num_hidden_layers", "num_experts_per_tok", "max_position_embeddings",
        family.experts_key[0], family.width_key,
    ]  # fmt: skip
    keys += ["shared_expert_intermediate_size"] if family.shared else []
    found = {key: parse_whole_number({key: getattr(config, key, None)}, key) for key in keys}
    if family.dense_layers:
        if config.decoder_sparse_step == 0:
            raise refuse("decoder_sparse_step", 0, "a whole number other than 0")
        settings = {k: getattr(config, k) for k in ("decoder_sparse_step", "mlp_only_layers")}
        if not all(family.is_moe(settings, n) for n in range(found["num_hidden_layers"])):
            parse_whole_number({"intermediate_size": config.intermediate_size}, "intermediate_size")
    top_k, experts = found["num_experts_per_tok"], found[family.experts_key[0]]
    if top_k > experts:
        raise InputError(
            f"config.json: num_experts_per_tok is {top_k}, but there are {experts} experts"
        )
    if found["max_position_embeddings"] < 2:
        raise refuse("max_position_embeddings", 1, "at least 2, as one token predicts the next")
    heads, groups, size = (found[key] for key in keys[1:4])
    if heads % groups:
        raise refuse("num_key_value_heads", groups, f"a divisor of the {heads} heads")
    if size % 2:
        raise refuse("head_dim", size, "an even number, as half of a head is rotated")
    if family.qk_norm == "full" and heads * size != found["hidden_size"]:
        raise refuse("head_dim", size, f"hidden_size / num_attention_heads in {family.model_type}")


def _check_values(family: Family, config: Any, given: Config) -> None:
    """Refuse values that change what the model computes in a way that no row carries out.

    Raises:
        InputError: a number of use is expected.
        Unsupported: names key, value and what the key does.
    """
    if config.hidden_act not in SILU:
        raise Unsupported(f"hidden_act {config.hidden_act!r} is not supported; only 'silu' is")
    for key in ("rms_norm_eps", *(("clip_qkv",) if family.clips else ())):
        value = getattr(config, key)
        if value is not None and value <= 0:
            raise refuse(key, value, "greater than 0")
    scales = {
        key: Fixed((None, config.head_dim**power), "a scale of attention that is not usual")
        for key, power in ATTENTION_SCALES.items()
    }
    norms = dict.fromkeys(QK_NORMS, Fixed((None, False), "and this family has no such norms"))
    rules = {**FIXED, **OTHER_FAMILIES, **scales, **(norms if family.qk_norm == "none" else {})}
    for key, rule in rules.items():
        if key in given and key not in family.reads and not rule.allows(given[key]):
            raise Unsupported(
                f"{family.model_type} with {key} {given[key]!r:.100} is not supported: "
                f"{rule.does}; supported: {', '.join(map(repr, rule.values))}"
            )


def _check_windows(family: Family, config: Any, given: Config) -> None:
    """Refuse windows that no token sees, and kinds of layers that are not what the blocks are.

    Raises:
        InputError: a window of no tokens.
        Unsupported: a kind of attention, or a window where the family has none.
    """
    size = getattr(config, "sliding_window", None)
    if family.window == "none" and size is not None:
        raise Unsupported(
            f"{family.model_type} with sliding_window {size!r:.100} is not supported, as some of "
            "transformers' implementations of attention follow it and some do not; supported: null"
        )
    types: Any = getattr(config, "layer_types", None)
    if family.window == "layer_types":
        usual = {"full_attention", "sliding_attention"}
        if odd := [kind for kind in types if kind not in usual]:
            raise Unsupported(f"layer type {odd[0]!r:.100} is not supported")
        slides = "sliding_attention" in types
    else:
        slides = size is not None
        kind = "sliding_attention" if slides else "full_attention"
        if types is not None and set(types) != {kind}:
            raise Unsupported(
                f"{family.model_type} with layer_types {given['layer_types']!r:.100} is not "
                f"supported: its layers are all {kind}, whatever this key says to the cache"
            )
    if slides and (type(size) is not int or size < 1):
        raise refuse("sliding_window", size, "at least 1, or null for none")
