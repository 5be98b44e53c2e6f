"""Frequency and temperature of the processors, where the system tells them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

CPUS = Path("/sys/devices/system/cpu")
THERMAL = Path("/sys/class/thermal")
NO_FREQUENCY = "the system does not tell the frequency of its processors (a virtual machine?)"
NO_TEMPERATURE = "the system does not tell a temperature (a virtual machine?)"


def read_sensors() -> dict[str, Any]:
    """Read frequency (MHz), temperature (Celsius) and count of throttling; None: unknown."""
    frequencies = read_numbers(CPUS.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
    temperatures = read_numbers(THERMAL.glob("thermal_zone*/temp"))
    throttled = read_numbers(CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
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


def read_numbers(paths: Iterable[Path]) -> list[int]:
    """Read a whole number from each file that can be read and holds one."""
    found = []
    for path in paths:
        with suppress(OSError, ValueError):
            found.append(int(path.read_text().strip()))
    return found
