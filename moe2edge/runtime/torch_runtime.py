"""Run a causal language model of transformers as a `Runtime`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError, VerificationFailed, join_lines
from moe2edge.model.architecture import find_layers
from moe2edge.model.transformers_config import find_class, is_pad_token
from moe2edge.runtime.plain_tensors import find_plain_source
from moe2edge.runtime.protocol import check_id_range
from moe2edge.storage.checkpoint import open_checkpoint
from moe2edge.storage.source_formats.recognition import find_settings
from moe2edge.storage.text_files import read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe2edge.runtime.protocol import Runtime

# Results that nobody reads here, whatever config.json asks for. Router logits would go into a loss
# of training, which takes no mask of attention but one of tokens.
NEUTRAL = dict.fromkeys(
    ("output_attentions", "output_hidden_states", "output_router_logits"), False
)


class TorchRuntime:
    """Runs a transformers model in evaluation mode, on the device that it is on.

    Logits are returned as float32 on the CPU, in whatever dtype the model computes.
    """

    drift = 0.0

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._cache: Any = None

    @property
    def dtype(self) -> str:
        """Dtype of activations, by its name in torch."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def note(self) -> str:
        """Description of how quantized matrices run, in one line; empty if there are none."""
        return str(getattr(self.model, "moe2edge_packed", ""))

    @property
    def threads(self) -> int:
        """Current number of processor threads of torch."""
        import torch

        return torch.get_num_threads()

    @property
    def cache_nbytes(self) -> int:
        """Bytes of what the model remembers of the sequence so far."""
        return sum(tensor.nbytes for tensor in _find_tensors(self._cache, {}).values())

    def logits(self, ids: Tensor) -> Tensor:
        """Return logits float32 [batch, length, vocabulary] of token ids int64 [batch, length]."""
        return self._run(ids, use_cache=False)

    def logits_at(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return logits float32 [n, vocabulary] of ids int64 [n] at ascending positions [n]."""
        placed = place_tokens(positions.to(self.model.device), self.model.dtype)
        return self._run(ids[None], use_cache=False, **placed)[0]

    def start(self, ids: Sequence[int]) -> Tensor:
        """Begin a sequence (prefill).

        Returns:
            Logits float32 [vocabulary] after its last token.

        Raises:
            InputError: there is no token.
        """
        import torch

        if not ids:
            raise InputError("a sequence needs at least one token")
        prompt = torch.tensor([list(ids)])
        # The cache is the one that the model makes: families have kinds of their own.
        # Only the last logits: those of all tokens would be the largest tensor by far.
        output = self._call(prompt, use_cache=True, logits_to_keep=1)
        self._cache = getattr(output, name_cache(self.model))
        return _take_logits(output)[0, -1]

    def step(self, token: int) -> Tensor:
        """Continue the sequence with one token (decode, cached).

        Returns:
            Logits float32 [vocabulary] after the token.

        Raises:
            Moe2EdgeError: no sequence was begun.
        """
        import torch

        if self._cache is None:
            raise Moe2EdgeError("step() came before start(); begin a sequence first")
        given = {name_cache(self.model): self._cache}
        return self._run(torch.tensor([[token]]), use_cache=True, **given)[0, -1]

    def find_overflow(self, ids: Tensor) -> str | None:
        """Run ``ids`` int64 [batch, length]; name the first block whose output is not finite."""
        found: list[int] = []

        def look(index: int) -> Callable[..., None]:
            def hook(_: Any, __: Any, out: Any) -> None:
                hidden = out[0] if isinstance(out, tuple) else out
                if not hidden.isfinite().all():
                    found.append(index)

            return hook

        layers = find_layers(self.model)[1]
        hooks = [layer.register_forward_hook(look(n)) for n, layer in enumerate(layers)]
        try:
            self._run(ids, use_cache=False)
        finally:
            for handle in hooks:
                handle.remove()
        return f"the hidden states of block {found[0]}" if found else None

    def _run(self, ids: Tensor, **options: Any) -> Tensor:
        return _take_logits(self._call(ids, **options))

    def _call(self, ids: Tensor, **options: Any) -> Any:
        import torch

        table = self.model.get_input_embeddings().weight
        check_id_range(int(ids.min()), int(ids.max()), len(table))
        with torch.inference_mode():
            return self.model(ids.to(self.model.device), **{**NEUTRAL, **options})


def _take_logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits.float().cpu()


def _find_tensors(found: Any, seen: dict[int, Any]) -> dict[int, Tensor]:
    """Find all tensors in a cache: families have kinds of their own, also for linear attention."""
    import torch

    tensors: dict[int, Tensor] = {}
    if isinstance(found, torch.Tensor):
        return {found.data_ptr(): found}
    if id(found) in seen:
        return {}
    seen[id(found)] = found
    inside: Any = ()
    if isinstance(found, Mapping):
        inside = found.values()
    elif isinstance(found, list | tuple):
        inside = found
    elif type(found).__module__.startswith("transformers."):
        inside = vars(found).values()
    for one in inside:
        tensors |= _find_tensors(one, seen)
    return tensors


def name_cache(model: Any) -> str:
    """Return the name of the cache among the arguments and the results of a model.

    Transformers 5.24 renamed it.
    """
    known = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def place_tokens(positions: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the arguments of a transformers model that place tokens at ``positions`` [n].

    Each token sees all before it. The mask is given, because transformers takes a gap between
    positions for the beginning of another text.
    """
    import torch

    count = len(positions)
    hidden = torch.full((count, count), torch.finfo(dtype).min, dtype=dtype).triu(1)
    return {
        "position_ids": positions[None],
        "attention_mask": hidden[None, None].to(positions.device),
    }


def run_all_experts(runtime: Runtime) -> Runtime:
    """Disable dynamic skipping in a `TorchRuntime`, in place, and return it."""
    from moe2edge.runtime.decoder_blocks import disable_skipping

    assert isinstance(runtime, TorchRuntime)
    disable_skipping(runtime.model)
    return runtime


def open_source(folder: Path, *, dtype: str = "bfloat16", strict: bool = False) -> TorchRuntime:
    """Open a checkpoint with stock transformers; code inside the checkpoint is not executed.

    Of a quantized checkpoint, transformers gets the dequantized tensors.

    Args:
        folder: folder with config and safetensors.
        dtype: dtype that the model computes in.
        strict: refuse a checkpoint whose tensors are not exactly those of its config. Without
            it, transformers initializes missing tensors and ignores unknown ones.

    Raises:
        InputError: transformers cannot load the checkpoint.
        VerificationFailed: with ``strict``, transformers cannot load the checkpoint, or reports a
            tensor as missing, unexpected or of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from moe2edge.runtime.expert_kernels import set_expert_implementation

    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    pad, vocabulary = config.get("pad_token_id"), config.get("vocab_size")
    changes = {}
    if type(pad) is int and type(vocabulary) is int and not is_pad_token(pad, vocabulary):
        changes = {"pad_token_id": None}
    kind: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": folder, **changes}
    try:
        if find_settings(config):
            kind, source = _prepare_dequantized(folder, getattr(torch, dtype), changes)
        else:
            kind = _choose_class(folder)
        model, info = kind.from_pretrained(
            **source,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Reported below instead of raised here, so that the message names the tensors.
            ignore_mismatched_sizes=strict,
            output_loading_info=True,
        )
    except (Moe2EdgeError, MemoryError):
        raise
    except Exception as error:  # whatever a library may raise on a folder that was changed
        error_type = VerificationFailed if strict else InputError
        plain = isinstance(error, OSError | ValueError | RuntimeError)
        reason = ("" if plain else f"{type(error).__name__}: ") + join_lines(error, 1000)
        raise error_type(f"transformers cannot load {folder}: {reason}") from error
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if strict and wrong:
        raise VerificationFailed(
            f"transformers loads {folder} with {wrong}; its tensors are not those of its "
            "config.json: export it again"
        )
    set_expert_implementation(model)
    return TorchRuntime(model)


def _choose_class(folder: Path) -> Any:
    """Return the class that opens a folder: that of its text model where none is for the whole."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return find_class(config)


def _prepare_dequantized(
    folder: Path, dtype: torch.dtype, changes: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the class of a quantized checkpoint, and what it is made of.

    Args:
        folder: the checkpoint.
        dtype: dtype of its dequantized tensors.
        changes: keys of its config to change.
    """
    import transformers

    model = open_checkpoint(folder).model
    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, **changes
    )
    source = find_plain_source(model, folder, config, dtype=dtype)
    return getattr(transformers, model.family.architecture), {**source, "config": config}
