"""Spellings of config keys that readers need which are older than transformers 5, or not of it."""

from __future__ import annotations

from typing import Any

# Transformers 4 has one of them for some families of which transformers 5 has the other.
COUNT_SPELLINGS = ("num_experts", "num_local_experts")
# Keys of ``rope_parameters`` that were keys of the config.
OWN_KEYS = ("rope_theta", "partial_rotary_factor")


def add_older_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Return a ``config.json`` with keys as transformers 4, mlx-lm and mistral.rs read them.

    Transformers 5 writes one spelling of the number of experts, and all of rotary embeddings in
    ``rope_parameters``; older readers take their defaults in place of what they do not find, which
    gives other numbers without an error. Transformers 5 reads both, if they say the same.

    Args:
        config: of a model, or of one of several parts.
    """
    from transformers import CONFIG_MAPPING

    config = dict(config)
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = add_older_spellings(config["text_config"])
        return config
    kind = config.get("model_type")
    aliases = CONFIG_MAPPING[kind].attribute_map if kind in CONFIG_MAPPING else {}
    for other, used in aliases.items():
        if {other, used} == {*COUNT_SPELLINGS} and used in config:
            config.setdefault(other, config[used])
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_type" in rope:  # else one for each kind of layers
        config |= {key: rope[key] for key in OWN_KEYS if key in rope and config.get(key) is None}
        if rope["rope_type"] != "default" and config.get("rope_scaling") is None:
            scaling = {key: value for key, value in rope.items() if key not in OWN_KEYS}
            config["rope_scaling"] = scaling
    return config
