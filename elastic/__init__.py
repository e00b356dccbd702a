"""Elastic turns a pretrained transformer into an elastic one: frozen weights, tiny routers, one dial for compute.

import elastic

student = elastic.load("runs/smollm2-135m-0.7")
outputs, decisions = student(input_ids)
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # as typing has it, whose import takes most of the time in which Ctrl-C cannot be caught yet
if TYPE_CHECKING:
    from typing import Any

__version__ = "0.1.0"

_HOME = {
    "distill": "elastic.trainer",
    "measure_run": "elastic.evaluate",
    "load": "elastic.run",
    "make_config": "elastic.config",
    "models": "teachers.registry",
    "elasticize": "students",
    "Student": "students",
    "StudentSpec": "students",
    "RouterSpec": "students",
    "LoraSpec": "students",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that `import elastic` itself loads neither torch nor transformers."""
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'elastic' has no attribute {name!r}; it has {', '.join(_HOME)}")
