"""Quantize a model with auto-round, on the CPU, to nearest.

    python peer_autoround.py MODEL OUT FORMAT [--sym]

FORMAT is one of its own: auto_gptq, auto_awq, auto_round, llm_compressor.
"""

from __future__ import annotations

import argparse
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> None:
    """Quantize and save."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("format")
    parser.add_argument("--sym", action="store_true")
    given = parser.parse_args()
    from auto_round import AutoRound

    model = AutoRound(
        given.model,
        scheme="W4A16",
        bits=4,
        group_size=32,
        sym=given.sym,
        iters=0,
        disable_opt_rtn=True,
        device_map="cpu",
    )
    model.quantize_and_save(given.out, format=given.format)


if __name__ == "__main__":
    main()
