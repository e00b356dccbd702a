"""What results depend on besides the configuration: versions of libraries, the commit, and the machine."""

from __future__ import annotations

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from elastic import __version__, launch
from students.kernels.trial import replaced


def surroundings() -> dict[str, Any]:
    """Return "versions" and "machine", as elastic.json and rows of results record them."""
    names = ("transformers", "timm", "accelerate")
    machine = {"platform": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name()
    if replaced:
        machine["replaced_kernels"] = ", ".join(sorted(replaced))
    if launch.size() > 1:
        machine["processes"] = launch.size()
    # a checkout of Elastic may not be installed, and torch.__version__ also says which CUDA torch was built for
    own = {"python": platform.python_version(), "elastic-distill": __version__ + _commit(), "torch": torch.__version__}
    return {"versions": {**own, **{name: version(name) for name in names}}, "machine": machine}


@cache
def _commit() -> str:
    """Return "+" and the commit, with "-dirty" after changes, if this is a checkout with git; else ""."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():  # git would find another repository that an environment lies in
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    with suppress(OSError, subprocess.SubprocessError):
        return "+" + subprocess.run(git, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    return ""


def _processor() -> str:
    """Return the processor's name, on Linux from /proc/cpuinfo, elsewhere from the module platform."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text(encoding="utf-8").splitlines() if known.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
