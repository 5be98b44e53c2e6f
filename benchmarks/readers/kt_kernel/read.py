"""Run the MoE layers of a GPTQ folder in kt-kernel, without our code: ``read.py FOLDER``.

Random hidden states and choices go through each layer; the outputs must be those of the integers
that this file unpacks itself, in float32, within 1 %: kt-kernel rounds activations to int8.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kt_kernel import KTMoEWrapper
from safetensors import safe_open

TOKENS, LIMIT = 5, 0.01
# It asks for pinned memory, which torch has only where there is an accelerator.
_EMPTY = torch.empty
if not torch.cuda.is_available():
    torch.empty = lambda *sizes, pin_memory=False, **settings: _EMPTY(*sizes, **settings)


def dequantize(file: Any, module: str) -> torch.Tensor:
    """Return a matrix [out, in] of symmetric 4 bits, by the words of GPTQ version 1."""
    words, scales = (file.get_tensor(f"{module}.{part}") for part in ("qweight", "scales"))
    shifts = 4 * torch.arange(8)
    q = ((words[:, None, :] >> shifts[None, :, None]) & 15).reshape(-1, words.shape[1])
    each = scales.float().repeat_interleave(q.shape[0] // scales.shape[0], 0)
    return ((q.float() - 8) * each).T


def compute(file: Any, layer: int, x: torch.Tensor, ids: torch.Tensor, by: torch.Tensor) -> Any:
    """Compute a layer in float32."""
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(ids[token].tolist(), by[token].tolist(), strict=True):
            stem = f"model.layers.{layer}.mlp.experts.{expert}"
            gate, up, down = (
                dequantize(file, f"{stem}.{part}") for part in ("gate_proj", "up_proj", "down_proj")
            )
            inner = torch.nn.functional.silu(gate @ x[token]) * (up @ x[token])
            out[token] += weight * (down @ inner)
    return out


def run_layer(folder: Path, layer: int, config: dict[str, Any]) -> float:
    """Return the relative error of one layer."""
    experts, top_k = config["num_experts"], config["num_experts_per_tok"]
    hidden = config["hidden_size"]
    wrapper = KTMoEWrapper(
        layer_idx=layer,
        num_experts=experts,
        num_experts_per_tok=top_k,
        hidden_size=hidden,
        moe_intermediate_size=config.get("moe_intermediate_size") or config["intermediate_size"],
        gpu_experts_mask=torch.zeros(experts, dtype=torch.bool),
        cpuinfer_threads=2,
        threadpool_count=1,
        weight_path=str(folder),
        chunked_prefill_size=64,
        method="GPTQ_INT4",
    )
    wrapper.load_weights(torch.arange(experts, dtype=torch.int64))
    x = torch.randn(TOKENS, hidden) * 0.5
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(TOKENS)])
    by = torch.rand(TOKENS, top_k)
    given, found = x.bfloat16().contiguous(), torch.zeros(TOKENS, hidden, dtype=torch.bfloat16)
    count = torch.tensor([TOKENS], dtype=torch.int32)
    pointers = (one.data_ptr() for one in (ids, by, given, found))
    wrapper.cpu_infer.submit(
        wrapper.moe.forward_task(count.data_ptr(), top_k, *pointers, False)  # not added to `found`
    )
    wrapper.cpu_infer.sync()
    with safe_open(folder / "model.safetensors", "pt") as file:
        wanted = compute(file, layer, given.float(), ids, by)
    return float((found.float() - wanted).norm() / wanted.norm())


def main() -> int:
    """Print a line for each layer; return the exit code."""
    folder = Path(sys.argv[1])
    config = json.loads((folder / "config.json").read_text())
    torch.manual_seed(0)
    print(", ".join(f"{name} {version(name)}" for name in ("kt-kernel", "torch")))
    errors = []
    for layer in range(config["num_hidden_layers"]):
        errors.append(run_layer(folder, layer, config))
        print(f"layer {layer}: {config['num_experts']} experts, error {errors[-1]:.1e}")
    print("passed" if max(errors) <= LIMIT else "FAILED")
    return int(max(errors) > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
