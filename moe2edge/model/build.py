"""Building a model from a config and handles on its tensors."""

from __future__ import annotations

from collections.abc import Callable

from moe2edge.model.config_parser import parse_config
from moe2edge.model.experts import Dense, Expert
from moe2edge.model.family import Config, Family, Geometry
from moe2edge.model.layers import MoELayer, Router, Shared
from moe2edge.model.model import EMBEDDING, FINAL_NORM, HEAD, Block, Model
from moe2edge.model.weights import Weight


def build_model(
    family: Family, config: Config, take: Callable[[str, tuple[int, ...]], Weight]
) -> Model:
    """Build the model of a config.

    Args:
        family: the row of the config.
        config: contents of ``config.json``.
        take: returns the handle of a tensor by its name on disk, and checks its shape.

    Raises:
        InputError: values of the config are wrong, or contradict each other.
        Unsupported: a value changes what the model computes in a way that is not supported.
    """
    config = parse_config(family, config)
    geometry = family.geometry(config)
    blocks = tuple(
        _build_block(family, config, geometry, index, take)
        for index in range(config["num_hidden_layers"])
    )
    table = (geometry.vocab, geometry.hidden)
    rest = {
        EMBEDDING: take(EMBEDDING, table),
        FINAL_NORM: take(FINAL_NORM, (geometry.hidden,)),
    }
    if not geometry.tied:
        rest[HEAD] = take(HEAD, table)
    return Model(family, config, blocks, rest)


def _build_block(
    family: Family,
    config: Config,
    geometry: Geometry,
    index: int,
    take: Callable[[str, tuple[int, ...]], Weight],
) -> Block:
    """Build block ``index``: attention, norms, and an MoE layer or MLP as the config says."""

    def weight(role: str, *shape: int) -> Weight:
        return take(family.disk_name(index, role), shape)

    def mlp(prefix: str, width: int) -> dict[str, Weight]:
        return {
            "gate": weight(f"{prefix}.gate", width, hidden),
            "up": weight(f"{prefix}.up", width, hidden),
            "down": weight(f"{prefix}.down", hidden, width),
        }

    hidden = geometry.hidden
    queries = geometry.heads * geometry.head_dim
    keys = geometry.kv_heads * geometry.head_dim
    shapes = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
    }
    attention = {f"{k}.weight": weight(f"attention.{k}.weight", *s) for k, s in shapes.items()}
    if family.bias_key and config[family.bias_key]:
        for k in ("q_proj", "k_proj", "v_proj", *(("o_proj",) if family.bias_on_o else ())):
            attention[f"{k}.bias"] = weight(f"attention.{k}.bias", shapes[k][0])
    if family.qk_norm != "none":
        full = family.qk_norm == "full"
        for k, size in (("q_norm", queries), ("k_norm", keys)):
            width = size if full else geometry.head_dim
            attention[f"{k}.weight"] = weight(f"attention.{k}.weight", width)
    norms = {
        f"{k}.weight": weight(f"norms.{k}.weight", hidden)
        for k in ("input_layernorm", "post_attention_layernorm")
    }
    body: MoELayer | Dense
    if family.is_moe(config, index):
        count = family.num_experts(config)
        width = config[family.width_key]
        router = Router(
            weight=weight("router.weight", count, hidden),
            top_k=config["num_experts_per_tok"],
            renormalize=bool(
                config[family.renormalize]
                if isinstance(family.renormalize, str)
                else family.renormalize
            ),
        )
        experts = tuple(Expert(**mlp(f"experts.{n}", width), origin=n) for n in range(count))
        shared = None
        if family.shared:
            shared_width = config["shared_expert_intermediate_size"]
            shared = Shared(
                Dense(**mlp("shared", shared_width)), weight("shared.router", 1, hidden)
            )
        body = MoELayer.make_plain(router, experts, shared)
    else:
        body = Dense(**mlp("dense", config["intermediate_size"]))
    window = family.window_of(config, index)
    return Block(index, index, attention, norms, body, window)
