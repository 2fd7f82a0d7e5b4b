"""The one object that every benchmark prints: what was measured, on what, of which commit.

    report("engine", settings, results, peers, as_json=True)
      -> {"name", "commit", "machine", "versions", "settings", "results", "peers"} on stdout

A benchmark measures and never judges: there is no bound here and no exit code for slow.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "numpy", "sglang", "openai", "renderers")
REPOSITORY = Path(__file__).resolve().parents[1]


def report(
    name: str,
    settings: dict[str, Any],
    results: dict[str, Any],
    peers: dict[str, Any],
    *,
    as_json: bool,
) -> None:
    """Print the object: one line of JSON, or a plain table."""
    content = described(name, settings, results, peers)
    if as_json:
        print(json.dumps(content))
        return
    print(f"{name}  {content['commit']}")
    for section in ("machine", "versions", "settings", "results", "peers"):
        print(f"\n{section}")
        for key, value in _rows(content[section]):
            print(f"  {key:<40} {value}")


def described(
    name: str, settings: dict[str, Any], results: dict[str, Any], peers: dict[str, Any]
) -> dict[str, Any]:
    """The object."""
    return {
        "name": name,
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
        "settings": settings,
        "results": results,
        "peers": peers,
    }


def commit() -> str:
    """``SWARM_COMMIT`` where it is set, else the hash of HEAD, "-dirty" if the tree differs."""
    if named := os.environ.get("SWARM_COMMIT"):
        return named
    try:
        head = _git("rev-parse", "HEAD")
        return f"{head}-dirty" if _git("status", "--porcelain") else head
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory in GB, and the GPU's name where there is one."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": _memory_gb(),
        "system": platform.platform(),
    }
    gpu = _gpu_name()
    return facts | ({"gpu": gpu} if gpu else {})


def versions() -> dict[str, str]:
    """Python and those of ``PACKAGES`` that are installed."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _rows(content: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, dict):
            rows += _rows(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, f"{value:.6g}" if isinstance(value, float) else str(value)))
    return rows


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError, AttributeError):  # not every system tells it
        return None


def _gpu_name() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None
