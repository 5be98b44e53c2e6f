"""Matrix products in bfloat16, where the processor multiplies it and the weights are bfloat16.

Such weights are exact, so only the inputs of a matrix and its outputs are rounded. Sums inside of a
product are float32; norms, softmax, activations and the residual stream stay float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

    from moe2edge.model.weights import Weight

# CPU capabilities, as torch names them, any of which means native bfloat16 matrix products.
NATIVE = ("amx_bf16", "avx512_bf16", "bf16")


@lru_cache
def multiplies_bfloat16(device: str = "cpu") -> bool:
    """Return whether a kind of device multiplies bfloat16 matrices natively."""
    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    # Older versions of torch have no such function.
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    mkldnn: Any = torch.backends.mkldnn  # has no types
    return bool(mkldnn.is_available()) and any(capabilities.get(name) for name in NATIVE)


def is_exact_in(weight: Weight, dtype: torch.dtype) -> bool:
    """Return whether ``dtype`` is that of a weight, or holds any weight exactly."""
    return dtype == torch.float32 or (weight.dtype == "BF16" and weight.scheme is None)


class NarrowLinear(nn.Linear):
    """A linear module that multiplies in the dtype of its matrix, whatever dtype it is given.

    Attributes:
        narrow: the matrix.
    """

    narrow: nn.Parameter

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The matrix in float32, for modules that multiply with it themselves (Mamba's ``dt``)."""
        return self.narrow.float()

    def forward(self, x: Tensor) -> Tensor:
        """Return the product, with the bias, in the dtype of ``x``."""
        out = nn.functional.linear(x.to(self.narrow.dtype), self.narrow).to(x.dtype)
        return out if self.bias is None else out + self.bias


def narrow_linear(module: nn.Linear, dtype: torch.dtype) -> None:
    """Let a linear module multiply in ``dtype``, in place."""
    narrow = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    del module.weight
    module.__class__ = NarrowLinear
    module.register_parameter("narrow", narrow)
