"""Quantize a model with llm-compressor, on the CPU, from token ids.

    python peer_llmcompressor.py MODEL TOKENS.npy OUT [--bits 4] [--group-size 128] [--threads 1]

Symmetric, static activation order as llm-compressor does by default; attention and experts, but not
router, embeddings or head. Each expert is calibrated on the tokens that are routed to it.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from typing import Any

import peers

ALONE = ["lm_head", r"re:.*\.gate$"]
ATTENTION = [r"re:.*\.self_attn\..*"]


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    options = peers.make_parser(__doc__)
    options.add_argument(
        "--all-experts", action="store_true", help="show every expert all tokens, its default"
    )
    options.add_argument("--observer", default="memoryless_minmax", help="how scales are chosen")
    options.add_argument("--offload", action="store_true", help="weights lie on the disk")
    return options.parse_args()


def load(given: argparse.Namespace, offload_folder: str) -> Any:
    """Load the model with one linear layer per expert matrix, in the dtype of its checkpoint."""
    from llmcompressor.utils import load_context
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": "auto"}
    if given.offload:
        # Nothing fits, so everything is offloaded.
        options |= {"device_map": "auto_offload", "max_memory": {"cpu": 1}}
        options["offload_folder"] = offload_folder
    # transformers looks into every module of its own that is loaded, and what stands for an image
    # processor then imports torchvision.
    for name in [name for name in sys.modules if ".image_processing_" in name]:
        del sys.modules[name]
    with load_context():
        return AutoModelForCausalLM.from_pretrained(str(given.model), **options)


def main() -> None:
    """Quantize and save."""
    given = parse_arguments()
    peers.use_processor(given.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import numpy as np
    import torch
    from compressed_tensors.quantization import QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoTokenizer

    torch.set_num_threads(given.threads)
    weights = {
        "num_bits": given.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": given.group_size,
        "observer": given.observer,
    }
    ignore = ALONE + (ATTENTION if given.experts_only else [])
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = GPTQModifier(config_groups={"group_0": scheme}, ignore=ignore)
    rows = np.load(given.tokens)
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": np.ones_like(rows)})
    with tempfile.TemporaryDirectory() as folder:
        model = load(given, folder)
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(str(given.model)),
            dataset=dataset,
            recipe=recipe,
            batch_size=given.batch_size,
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
            max_seq_length=rows.shape[1],
            moe_calibrate_all_experts=given.all_experts,
        )
        model.save_pretrained(str(given.out), save_compressed=True)


if __name__ == "__main__":
    main()
