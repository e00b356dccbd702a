"""Checkpoint files: tensors and a description in one safetensors file, which is never left half-written."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMER_NAMES = {"bend": "mlp", "unlike": "distance_weight"}
"""Parts of parameter names in files of earlier versions, and their present names."""


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """Write tensors and a JSON-able description to one file, under a temporary name that is then renamed to `path`."""
    part = path.with_name(f".{path.name}.part")
    try:
        clones = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        part.touch()
        mode = part.stat().st_mode
        save_file(clones, part, metadata={"elastic": json.dumps(about)})
        part.chmod(mode)  # safetensors makes files that only their owner can read
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (SafetensorError, OSError) as error:
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        with suppress(OSError):  # unlinking fails too on a read-only disk
            part.unlink(missing_ok=True)


def read_tensors(path: Path, *needed: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the description of a file that `write_tensors` wrote. ValueError if the file is missing,
    truncated or none of Elastic's, if a tensor holds NaN, or if its description lacks one of the keys `needed`."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["elastic"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = about if isinstance(about, dict) else {}
        if missing := [key for key in needed if key not in about]:
            raise KeyError(f"its description lacks {', '.join(missing)}")
        if odd := [name for name, tensor in tensors.items() if tensor.isnan().any()]:
            raise KeyError(f"{odd[0]} holds NaN")
        return {".".join(FORMER_NAMES.get(part, part) for part in n.split(".")): x for n, x in tensors.items()}, about
    except FileNotFoundError:
        raise ValueError(f"{path} {'may not be read' if path.exists() else 'does not exist'}") from None
    except OSError as error:  # a folder has this name, say
        raise ValueError(f"{path} cannot be read: {error}") from None
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        reason = error.args[0] if error.args else error
        raise ValueError(
            f"{path} is damaged or no checkpoint of Elastic ({reason}); restore it or distil again"
        ) from None
