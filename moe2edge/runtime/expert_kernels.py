"""Choice of the implementation that transformers computes experts with.

Its default, ``grouped_mm``, calls torch's kernel of the same name. That takes float32, bfloat16 and
float16, and only rows of a multiple of 16 bytes. Other models run with ``eager``, a loop over the
experts, which takes every shape and dtype.
"""

from __future__ import annotations

from typing import Any

from moe2edge.model.anatomy import is_experts

# Bytes that a row of each operand of torch's grouped_mm must be a multiple of.
ROW_BYTES = 16
GROUPED_DTYPES = ("float32", "bfloat16", "float16")


def takes_grouped_mm(row_lengths: tuple[int, ...], dtype: str) -> bool:
    """Return whether torch's ``grouped_mm`` takes matrices with rows of these lengths.

    >>> takes_grouped_mm((64, 36), "float32"), takes_grouped_mm((64, 36), "bfloat16")
    (True, False)
    """
    if dtype not in GROUPED_DTYPES:
        return False
    size = 4 if dtype == "float32" else 2
    return all(length * size % ROW_BYTES == 0 for length in row_lengths)


def set_expert_implementation(model: Any) -> None:
    """Let ``model``, of transformers, compute its experts by a loop where ``grouped_mm`` cannot.

    Call it once the model has its layers and dtype; parameters may be on the meta device.
    """
    for module in model.modules():
        if not is_experts(module):
            continue
        down = module.down_proj
        fused = module.gate_up_proj if module.has_gate else module.up_proj
        rows = (fused.shape[-1], down.shape[-1])
        if not takes_grouped_mm(rows, str(down.dtype).removeprefix("torch.")):
            model.set_experts_implementation("eager")
            return
