"""Quantize a model with GPTQModel, on the CPU, from token ids.

    python peer_gptqmodel.py MODEL TOKENS.npy OUT [--bits 4] [--group-size 128] [--threads 1]

Symmetric, group-aware activation order as GPTQModel does by default (``g_idx`` stays trivial);
attention and experts, but not router, embeddings or head.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

ATTENTION_IN_16_BITS: dict[str, dict[str, Any]] = {r"-:.*\.self_attn\..*": {}}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path, help="int64 [samples, length], .npy")
    parser.add_argument("out", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=4, help="samples in a forward pass")
    parser.add_argument("--experts-only", action="store_true", help="attention stays in 16 bits")
    parser.add_argument(
        "--act-order", action="store_true", help="desc_act, whose g_idx is not trivial"
    )
    parser.add_argument("--mse", type=float, default=0.0, help="norm of the search for scales")
    return parser.parse_args()


def main() -> None:
    """Quantize and save."""
    given = arguments()
    # Before torch is imported, which reads it once.
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(given.threads)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Its default on two processors is one worker, with which it refuses to start.
    os.environ["GPTQMODEL_CPU_WORKERS"] = str(max(2, given.threads))
    import numpy as np
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(given.threads)
    config = QuantizeConfig(
        bits=given.bits,
        group_size=given.group_size,
        sym=True,
        desc_act=given.act_order,
        act_group_aware=not given.act_order,
        mse=given.mse,
        device="cpu",
        dynamic=ATTENTION_IN_16_BITS if given.experts_only else None,
    )
    rows = np.load(given.tokens).tolist()
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in rows]
    model = GPTQModel.load(str(given.model), config)
    model.quantize(samples, batch_size=given.batch_size)
    model.save(str(given.out))


if __name__ == "__main__":
    main()
