"""Any causal language model of transformers as a `Runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError

if TYPE_CHECKING:
    from torch import Tensor


class TorchRuntime:
    """Runs a transformers model, in evaluation mode, on the device where it lies.

    Logits come back as float32 on the CPU, whatever the model computes in.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._cache: Any = None

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [batch, length, vocabulary] of token ids int64 [batch, length]."""
        return self._run(ids, use_cache=False)

    def start(self, ids: Sequence[int]) -> Tensor:
        """Begin a sequence (prefill): logits float32 [length, vocabulary] of all its tokens."""
        import torch
        from transformers import DynamicCache

        # With the config, the cache knows which layers see a sliding window only.
        self._cache = DynamicCache(config=self.model.config)
        return self._run(torch.tensor([list(ids)]), past_key_values=self._cache)[0]

    def step(self, token: int) -> Tensor:
        """Go on with one more token (decode, cached): logits float32 [vocabulary] after it.

        Raises:
            Moe2EdgeError: no sequence was begun.
        """
        import torch

        if self._cache is None:
            raise Moe2EdgeError("step() came before start(); begin a sequence first")
        return self._run(torch.tensor([[token]]), past_key_values=self._cache)[0, -1]

    def _run(self, ids: Tensor, **options: Any) -> Tensor:
        import torch

        with torch.inference_mode():
            output = self.model(ids.to(self.model.device), **options)
        logits: Tensor = output.logits
        return logits.float().cpu()


def open_source(folder: Path, *, dtype: str = "bfloat16") -> TorchRuntime:
    """A checkpoint as stock transformers runs it; nothing of its code is executed.

    Args:
        folder: config and safetensors.
        dtype: in which the model computes.

    Raises:
        InputError: transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"transformers cannot load {folder}: {reason}") from error
    return TorchRuntime(model)
