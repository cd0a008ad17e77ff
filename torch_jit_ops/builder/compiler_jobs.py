"""How many compilers this machine, or the container on it, can run at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# nvcc's cicc and ptxas on a kernel with heavy templates; the six built-in ones take 0.2 GB (CUDA 13.0, November 2026).
COMPILER_BYTES = 1_500_000_000


def compiler_jobs(root: Path = Path("/")) -> int:
    """At least 1: the least of the cores that this process may use, its cgroups' CPU quota, and memory over 1.5 GB.

    Args:
        root: where /proc and /sys are.
    """
    cores = float(len(os.sched_getaffinity(0)))
    memory = _available_memory(root)
    for group in _groups(root):
        cores = min(cores, _cpus_of(group))
        memory = min(memory, _free_memory_of(group))
    return max(1, int(min(cores, memory / COMPILER_BYTES)))


def _available_memory(root: Path) -> float:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            return float(line.split()[1]) * 1024
    return float("inf")


def _groups(root: Path) -> Iterator[Path]:
    """The folders of this process's cgroups, from the innermost out: each may have limits of its own. Both versions."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            if controller not in ("", "cpu", "memory"):
                continue
            mount = mounts / controller
            # In a container the path may be the host's, of which only the mount itself is to be seen.
            inner = Path(path.strip("/"))
            for folder in (inner, *inner.parents):
                if (mount / folder).is_dir():
                    yield mount / folder


def _cpus_of(group: Path) -> float:
    quota, period = [*_read(group / "cpu.max").split(), "", ""][:2]
    if not quota:
        quota, period = _read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip()
    return float(quota) / float(period) if quota.isdigit() and period.isdigit() else float("inf")


def _free_memory_of(group: Path) -> float:
    for limit, used, dropped in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        most, now = _read(group / limit).strip(), _read(group / used).strip()
        if most.isdigit() and now.isdigit():
            # What the kernel keeps of files counts as used, and is given up when memory is short.
            stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line)
            return float(most) - float(now) + float(stat.get(dropped, 0))
    return float("inf")


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""  # no such limit here
