"""Energy that processors and GPUs took, by the counters of RAPL and NVML."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moe2edge.evaluation.profile.memory import list_started
from moe2edge.evaluation.profile.sensors import read_numbers

POWERCAP = Path("/sys/class/powercap")
NO_RAPL = "the system has no readable counter of energy (RAPL, intel-rapl in /sys/class/powercap)"
NO_NVML = "that of a GPU takes NVML (pip install 'nvidia-ml-py>=13.595')"


class RaplCounter:
    """Counter of one package of processors, in microjoules.

    Attributes:
        name: the package, for people.
    """

    def __init__(self, place: Path) -> None:
        """Take the folder of the package."""
        self._place = place
        self.name = f"{place.name} (RAPL)"

    def read(self) -> float:
        """Return joules since some time."""
        return read_numbers([self._place / "energy_uj"])[0] / 1e6

    @property
    def span(self) -> float:
        """Joules after which the counter begins anew; 0: not known."""
        return (read_numbers([self._place / "max_energy_range_uj"]) or [0])[0] / 1e6


class NvmlCounter:
    """Counter of one GPU, in millijoules.

    Attributes:
        name: the GPU, for people.
    """

    # It has 64 bits and begins with the driver.
    span = 0.0

    def __init__(self, library: Any, number: int) -> None:
        """Take the library, initialized, and the number of the GPU.

        Raises:
            NVMLError: the GPU has no counter, or does not tell which processes run on it.
        """
        self._library, self._handle = library, library.nvmlDeviceGetHandleByIndex(number)
        self.name = f"GPU {number} (NVML)"
        self.read()
        self.runs(())

    def read(self) -> float:
        """Return joules since some time."""
        return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3

    def runs(self, processes: Sequence[int]) -> bool:
        """Return whether one of the processes computes on the GPU."""
        found = self._library.nvmlDeviceGetComputeRunningProcesses(self._handle)
        return any(one.pid in processes for one in found)


class EnergyMeter:
    """Reads the energy that all packages of processors and the GPUs in use took, in joules.

    What other programs take is counted too.

    Attributes:
        reason: why there is none; None where there is.
        names: what is counted.
    """

    def __init__(self) -> None:
        """Find the counters; those of GPUs once a model is open, since only then is one in use."""
        # Domains within a package (intel-rapl:0:0) are parts of it.
        self._counters: list[RaplCounter | NvmlCounter] = [
            RaplCounter(place)
            for place in sorted(POWERCAP.glob("intel-rapl:*"))
            if place.name.count(":") == 1 and read_numbers([place / "energy_uj"])
        ]
        self._gpus, self._said = list_gpus()
        self._begin: list[float] = []

    @property
    def names(self) -> list[str]:
        """Names of what is counted."""
        return [one.name for one in self._counters]

    @property
    def reason(self) -> str | None:
        """Reason why nothing is counted; None where something is."""
        return None if self._counters else f"{NO_RAPL}; {self._said}"

    def look_for_gpus(self) -> None:
        """Count the GPUs that this process, or one that it started, computes on."""
        own = [os.getpid(), *(int(place.name) for place in list_started())]
        used = [gpu for gpu in self._gpus if gpu.runs(own)]
        self._counters, self._gpus = [*self._counters, *used], []

    def start(self) -> None:
        """Begin to measure."""
        self._begin = [counter.read() for counter in self._counters]

    def read(self) -> float | None:
        """Return the joules since `start`; None: not known."""
        if not self._counters:
            return None
        total = 0.0
        for counter, begin in zip(self._counters, self._begin, strict=True):
            taken = counter.read() - begin
            total += taken if taken >= 0 else taken + counter.span  # it began anew
        return total


def list_gpus() -> tuple[list[NvmlCounter], str]:
    """List the GPUs whose energy NVML tells; and what to say if none of them is used."""
    try:
        import pynvml
    except ImportError:
        return [], NO_NVML
    found, said = [], "no GPU was used"
    try:
        pynvml.nvmlInit()
        for number in range(pynvml.nvmlDeviceGetCount()):
            found.append(NvmlCounter(pynvml, number))
    except pynvml.NVMLError as error:
        said = f"NVML tells no energy of a GPU ({error})"
    return found, said
