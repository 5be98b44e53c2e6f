"""Transformers' own model of a config, without numbers, and the parts that are found in it.

The model is built on the meta device from the full config, so every block stands at its true index
and is what transformers' code makes of it. Where experts, routers and everything else with one
entry per expert are, is found by looking: a second model with twice as many experts is laid beside
the first, and what differs in size has one entry per expert. A row of the table of families says
only which keys of the config hold the number of experts and the top-k.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MethodType
from typing import TYPE_CHECKING, Any

from moe2edge.errors import Unsupported, join_lines
from moe2edge.model.anatomy import Anatomy, find_anatomy
from moe2edge.model.family import Family
from moe2edge.model.parameter_names import Stored, list_usual_names
from moe2edge.model.transformers_config import (
    find_class,
    is_pad_token,
    make_transformers_config,
)

if TYPE_CHECKING:
    from torch import Tensor


# Methods of tensors that do nothing but give them other numbers, of which meta tensors have none.
_FILLING = frozenset({"uniform_", "normal_", "fill_", "zero_", "copy_"})


@dataclass(frozen=True, eq=False)
class Architecture:
    """Transformers' model of a config, on the meta device.

    Attributes:
        config: transformers' config of the text model.
        count_key, top_k_key: keys of the numbers of experts, and of chosen ones.
    """

    config: Any
    count_key: str
    top_k_key: str

    @cached_property
    def model(self) -> Any:
        """The model; nobody may fill or change it: see `build_meta_model`."""
        return build_meta_model(self.config)

    @cached_property
    def layers_path(self) -> str:
        """Path of the list of decoder layers."""
        return find_layers(self.model)[0]

    @cached_property
    def embedding(self) -> str:
        """Name of the embedding table."""
        table = self.model.get_input_embeddings()
        path = next(path for path, module in self.model.named_modules() if module is table)
        return f"{path}.weight"

    @cached_property
    def head(self) -> str | None:
        """Name of the matrix of the head; None: the class of transformers names none."""
        head = self.model.get_output_embeddings()
        found = (path for path, module in self.model.named_modules() if module is head)
        path = None if head is None else next(found, None)
        return None if path is None else f"{path}.weight"

    @cached_property
    def usual_names(self) -> dict[str, Stored]:
        """Form in which transformers stores each parameter."""
        return list_usual_names(self.model)

    @cached_property
    def looks(self) -> dict[Any, Any]:
        """Results of further looks at its layers, kept by those who look: see `traits`."""
        return {}

    @cached_property
    def anatomy(self) -> tuple[Anatomy, ...]:
        """Parts of each layer."""
        layers = find_layers(self.model)[1]
        more = self._build_beside(self.count_key, 2)
        wider = self._build_beside(self.top_k_key, 2)
        kinds: list[tuple[Any, Anatomy]] = []
        found = []
        # Layers of one kind have one anatomy, which is looked for once.
        for trio in zip(layers, more, wider, strict=True):
            kind = tuple(map(describe_layer, trio))
            known = next((anatomy for other, anatomy in kinds if other == kind), None)
            if known is None:
                kinds.append((kind, known := find_anatomy(*trio)))
            found.append(known)
        return tuple(found)

    def get_top_k(self, index: int) -> int:
        """Return the number of experts that a token chooses in layer ``index``."""
        value = getattr(self.config, self.top_k_key)
        return int(value[index] if isinstance(value, list) else value)

    def _build_beside(self, key: str, factor: int) -> Any:
        """Return the layers of a model with another number under a key of the config."""
        changed = copy.deepcopy(self.config)
        value: Any = getattr(changed, key)
        many = [n * factor for n in value] if isinstance(value, list) else value * factor
        setattr(changed, key, many)
        return find_layers(build_meta_model(changed))[1]


def build_meta_model(config: Any) -> Any:
    """Build transformers' causal language model of a text config on the meta device, in float32.

    Raises:
        Unsupported: transformers has no such class, or its class refuses the config.
    """
    import torch

    kind = find_class(config)
    try:
        with torch.device("meta"), _make_no_numbers(), warnings.catch_warnings():
            # A shared expert of width 0, of which torch says that there is nothing to initialize.
            warnings.filterwarnings("ignore", "Initializing zero-element")
            return kind._from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    except MemoryError:
        raise
    except Exception as error:  # whatever the code of a family raises on values of no use to it
        reason = join_lines(error)
        raise Unsupported(f"transformers cannot build {config.model_type}: {reason}") from error


def _make_no_numbers() -> Any:
    """Return a context in which torch initializes no weights, which takes half of the time."""
    from torch.overrides import TorchFunctionMode

    class NoNumbers(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, _: Any, given: tuple[Any, ...] = (), more: Any = None
        ) -> Any:
            fills = getattr(function, "__module__", "") == "torch.nn.init"
            if fills or getattr(function, "__name__", "") in _FILLING:
                return given[0] if given else more["tensor"]
            return function(*given, **(more or {}))

    return NoNumbers()


def find_layers(model: Any) -> tuple[str, Any]:
    """Find the list of decoder layers of a model: its path and the modules.

    Raises:
        Unsupported: there is none.
    """
    from torch import nn

    lists = ((p, m) for p, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m))
    found = max(lists, key=lambda one: _count_parameters(one[1]), default=None)
    if found is None:
        raise Unsupported(f"no list of decoder layers was found in {type(model).__name__}")
    return found


def _count_parameters(module: Any) -> int:
    return sum(p.numel() for p in module.parameters())


def pass_by(module: Any) -> Any:
    """Let a module hand on the hidden states that it gets, and return it."""
    module.forward = MethodType(_pass_on, module)
    return module


def _pass_on(_: Any, hidden_states: Tensor, *__: Any, **___: Any) -> Tensor:
    return hidden_states


def describe_layer(layer: Any) -> dict[tuple[str, str], Any]:
    """Return shapes, classes of modules and their numbers: all that a layer is but its place."""
    found: dict[tuple[str, str], Any] = {
        (path, ""): tuple(tensor.shape) for path, tensor in layer.state_dict().items()
    }
    for path, module in layer.named_modules():
        found[path, "class"] = type(module)
        for name, value in vars(module).items():
            if isinstance(value, int | float | str) and name != "layer_idx":
                found[path, name] = value
    return found


# ---- configs -------------------------------------------------------------------------------------


def find_architecture(family: Family, config: Mapping[str, Any]) -> Architecture:
    """Return transformers' model of a config; the same one for the same config.

    Args:
        family: the row of the config.
        config: as `parse_config` returns it.
    """
    return _find_architecture(family, json.dumps(config, sort_keys=True))


@lru_cache(maxsize=8)
def _find_architecture(family: Family, config: str) -> Architecture:
    return make_architecture(family, json.loads(config))


def make_architecture(family: Family, settings: Mapping[str, Any]) -> Architecture:
    """Make transformers' model of a config anew, for one look at it."""
    if not is_pad_token(settings.get("pad_token_id"), settings["vocab_size"]):
        settings = {**settings, "pad_token_id": None}
    parsed = make_transformers_config(family.model_type, settings)
    return Architecture(parsed, family.experts_key[0], family.top_k_key)
