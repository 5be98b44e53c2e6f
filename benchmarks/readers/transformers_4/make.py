"""Make tiny random models, as transformers 5 writes them, and trim them: ``make.py FOLDER``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from moe2edge.model.family import FAMILIES
from moe2edge.testing import make_checkpoint, make_tokenizer

RECIPE = """\
calibration: {text: %s, samples: 4, length: 32}
evaluation: {text: %s, samples: 2, length: 32}
passes:
  - expert_drop: {keep: 4}
"""


def main() -> None:
    """Write a folder of target hf for each family of the table."""
    work = Path(sys.argv[1])
    text = work / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    recipe = work / "recipe.yaml"
    recipe.write_text(RECIPE % (text, text))
    for name in sorted(FAMILIES):
        source = make_checkpoint(work / "sources" / name, name)
        make_tokenizer(source)
        command = ["export", source, "-r", recipe, "-t", "hf", "-o", work / name, "--quiet"]
        subprocess.run([sys.executable, "-m", "moe2edge", *map(str, command)], check=True)


if __name__ == "__main__":
    main()
