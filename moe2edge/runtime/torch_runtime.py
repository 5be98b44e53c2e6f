"""Any causal language model of transformers as a `Runtime`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe2edge.errors import InputError, Moe2EdgeError, VerificationFailed

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.runtime.protocol import Runtime


class TorchRuntime:
    """Runs a transformers model, in evaluation mode, on the device where it lies.

    Logits come back as float32 on the CPU, whatever the model computes in.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self._cache: Any = None

    @property
    def dtype(self) -> str:
        """What the model computes in, as torch names it."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def note(self) -> str:
        """How quantized matrices run, in one line; empty if there are none."""
        return str(getattr(self.model, "moe2edge_packed", ""))

    @property
    def threads(self) -> int:
        """Processor threads of torch, at present."""
        import torch

        return torch.get_num_threads()

    def logits(self, ids: Tensor) -> Tensor:
        """Logits float32 [batch, length, vocabulary] of token ids int64 [batch, length]."""
        return self._run(ids, use_cache=False)

    def start(self, ids: Sequence[int]) -> Tensor:
        """Begin a sequence (prefill): logits float32 [vocabulary] after its last token.

        Raises:
            InputError: there is no token.
        """
        import torch
        from transformers import DynamicCache

        if not ids:
            raise InputError("a sequence needs at least one token")
        # With the config, the cache knows which layers see a sliding window only.
        self._cache = DynamicCache(config=self.model.config)
        whole = torch.tensor([list(ids)])
        # Logits of every token would be the largest tensor by far.
        return self._run(whole, past_key_values=self._cache, logits_to_keep=1)[0, -1]

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


def run_all_experts(runtime: Runtime) -> Runtime:
    """Take dynamic skipping off a runtime of this module."""
    from moe2edge.runtime.decoder_blocks import disable_skipping

    assert isinstance(runtime, TorchRuntime)
    disable_skipping(runtime.model)
    return runtime


def open_source(folder: Path, *, dtype: str = "bfloat16", strict: bool = False) -> TorchRuntime:
    """A checkpoint as stock transformers runs it; nothing of its code is executed.

    Args:
        folder: config and safetensors.
        dtype: in which the model computes.
        strict: refuse a checkpoint that does not hold exactly what its config asks for; without
            it, transformers fills in what is missing and drops what it does not know.

    Raises:
        InputError: transformers cannot load it.
        VerificationFailed: so with ``strict``, or it reports a tensor as missing, unexpected or
            of another shape.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            # Not raised but reported, so that the tensors can be named.
            ignore_mismatched_sizes=strict,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        kind = VerificationFailed if strict else InputError
        reason = " ".join(str(error).split())
        raise kind(f"transformers cannot load {folder}: {reason}") from error
    wrong = {what: sorted(map(str, names)) for what, names in info.items() if names}
    if strict and wrong:
        raise VerificationFailed(
            f"transformers loads {folder} with {wrong}; it does not hold what its "
            "config.json asks for: export it again"
        )
    return TorchRuntime(model)
