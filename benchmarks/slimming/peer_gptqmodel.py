"""Quantize a model with GPTQModel, on the CPU, from token ids.

    python peer_gptqmodel.py MODEL TOKENS.npy OUT [--bits 4] [--group-size 128] [--threads 1]

Symmetric, group-aware activation order as GPTQModel does by default (``g_idx`` stays trivial);
attention and experts, but not router, embeddings or head.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import peers

ATTENTION_IN_16_BITS: dict[str, dict[str, Any]] = {r"-:.*\.self_attn\..*": {}}


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    options = peers.make_parser(__doc__)
    options.add_argument(
        "--act-order", action="store_true", help="desc_act, whose g_idx is not trivial"
    )
    options.add_argument("--mse", type=float, default=0.0, help="norm of the search for scales")
    return options.parse_args()


def main() -> None:
    """Quantize and save."""
    given = parse_arguments()
    peers.use_processor(given.threads)
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
