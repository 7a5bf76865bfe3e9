"""Records the versions, commit and machine that made a result."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

GIT_SECONDS = 10.0
"""Seconds that git gets for its answer: on a network's disk it can hang."""


def environment() -> dict[str, Any]:
    """Collect the versions, commit and machine, to be written beside results."""
    packages = ("videorepa", "torch", "diffusers", "transformers", "peft", "accelerate")
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed as a package"
    return versions | {
        "python": platform.python_version(),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
    }


def _commit() -> str:
    """The commit that this file is of, or "unknown" if git is missing or does not know it."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
