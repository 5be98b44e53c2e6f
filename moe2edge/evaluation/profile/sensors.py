"""Frequency, temperature and energy of the processors, where the system tells them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CPUS = Path("/sys/devices/system/cpu")
THERMAL = Path("/sys/class/thermal")
POWERCAP = Path("/sys/class/powercap")
NO_FREQUENCY = "the system does not tell the frequency of its processors (a virtual machine?)"
NO_TEMPERATURE = "the system does not tell a temperature (a virtual machine?)"
NO_ENERGY = "the system has no readable counter of energy (RAPL, intel-rapl in /sys/class/powercap)"


def read_sensors() -> dict[str, Any]:
    """Read frequency (MHz), temperature (Celsius) and count of throttling; None: unknown."""
    frequencies = _read_numbers(CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    temperatures = _read_numbers(THERMAL.glob("thermal_zone*/temp"))
    throttled = _read_numbers(CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    return {
        "mhz": sum(frequencies) / len(frequencies) / 1000 if frequencies else None,
        "celsius": max(temperatures) / 1000 if temperatures else None,
        "throttled": sum(throttled) if throttled else None,
    }


def compare_sensors(before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Compare the readings of one process, at begin and end; null with a reason where unknown."""
    first, last = before[0], before[-1]
    known = None not in (first["throttled"], last["throttled"])
    return {
        "mhz": [reading["mhz"] for reading in before],
        "mhz_reason": NO_FREQUENCY if first["mhz"] is None else None,
        "celsius": [reading["celsius"] for reading in before],
        "celsius_reason": NO_TEMPERATURE if first["celsius"] is None else None,
        "throttled": last["throttled"] - first["throttled"] if known else None,
    }


class EnergyMeter:
    """Reads the energy that all packages of processors took; joules, other programs included.

    Attributes:
        reason: why there is none; None where there is.
    """

    def __init__(self) -> None:
        # Domains within a package (intel-rapl:0:0) are parts of it.
        self._places = [
            place
            for place in sorted(POWERCAP.glob("intel-rapl:*"))
            if place.name.count(":") == 1 and _read_numbers([place / "energy_uj"])
        ]
        self.reason = None if self._places else NO_ENERGY
        self._begin: list[int] = []

    def start(self) -> None:
        """Begin to measure."""
        self._begin = [_read_numbers([place / "energy_uj"])[0] for place in self._places]

    def read(self) -> float | None:
        """Return the joules since `start`; None: not known."""
        if self.reason is not None:
            return None
        total = 0
        for place, begin in zip(self._places, self._begin, strict=True):
            taken = _read_numbers([place / "energy_uj"])[0] - begin
            if taken < 0:  # the counter began anew
                taken += (_read_numbers([place / "max_energy_range_uj"]) or [0])[0]
            total += taken
        return total / 1e6


def _read_numbers(paths: Any) -> list[int]:
    found = []
    for path in paths:
        with suppress(OSError, ValueError):
            found.append(int(path.read_text().strip()))
    return found
