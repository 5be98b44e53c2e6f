"""Opening checkpoints with very many tensors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.opening import OPEN, OWN, write_checkpoint


@pytest.mark.slow
@pytest.mark.parametrize("family", OWN)
def test_opening_thousands_of_tensors_takes_little(family: str, tmp_path: Path) -> None:
    """Within 100 MB; the time, a third of this on an idle machine, is that of the process."""
    assert write_checkpoint(tmp_path, family) > 18432
    command = [sys.executable, "-c", OPEN, str(tmp_path), family]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    _, cpu, nbytes = json.loads(done.stdout.splitlines()[-1])
    assert cpu < 4
    assert nbytes < 100e6
