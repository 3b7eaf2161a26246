"""How much memory a process can still take."""

from __future__ import annotations

from pathlib import Path

import psutil

#: Where Linux keeps the limits of control groups, which containers are.
_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def free_memory() -> int:
    """In bytes: what the machine has free, or less where a control group of this process leaves less."""
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> list[int]:
    """What each control group around this process leaves (version 2); nothing where there are none with a limit."""
    try:
        name = next(line for line in _OWN.read_text().splitlines() if line.startswith("0::")).removeprefix("0::")
    except (OSError, StopIteration):
        return []
    place, left = _GROUPS / name.strip("/"), []
    for group in [place, *place.parents]:
        if not group.is_relative_to(_GROUPS):
            break
        try:
            limit, used = int((group / "memory.max").read_text()), int((group / "memory.current").read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group here, or "max"
            continue
        left.append(max(0, limit - used + int(statistics.get("inactive_file", 0))))  # files that can go at once
    return left
