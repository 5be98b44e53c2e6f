"""Control groups of this process, whose limits are those of a container or a systemd scope."""

from __future__ import annotations

import contextlib
from pathlib import Path

# Folder of the hierarchy of version 2, and of that of version 1 of a controller.
_MOUNT, _MOUNT_1 = "sys/fs/cgroup", "sys/fs/cgroup/{}"


def list_control_groups(controller: str, root: Path = Path("/")) -> list[Path]:
    """List the folders of the control groups of this process, the innermost first.

    Version 2 has one hierarchy, version 1 one for each controller. A limit of a group holds for
    those inside it. In a container its own group is at the top of what it sees.

    Args:
        controller: such as ``memory``.
        root: folder with ``proc`` and ``sys``.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    groups = [line.split(":", 2) for line in lines if line.count(":") >= 2]
    found = []
    for name, mount in (("", _MOUNT), (controller, _MOUNT_1.format(controller))):
        place = next((g[2] for g in groups if name in g[1].split(",")), "/")
        folder = Path(place.lstrip("/"))
        found += [root / mount / group for group in (folder, *folder.parents)]
    return found


def find_cpu_quota(root: Path = Path("/")) -> float | None:
    """Return the processors whose time the control groups allow; None: there is no limit.

    Args:
        root: as in `list_control_groups`.
    """
    quotas = []
    for group in list_control_groups("cpu", root):
        with contextlib.suppress(OSError, ValueError):  # "max 100000" if there is no limit
            quota, period = map(int, (group / "cpu.max").read_text().split())
            quotas.append(quota / period)
        with contextlib.suppress(OSError, ValueError):
            quota, period = (
                int((group / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period")
            )
            if quota > 0:  # -1 if there is no limit
                quotas.append(quota / period)
    return min(quotas, default=None)
