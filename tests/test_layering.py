"""The import rule: losses, students and teachers import neither each other nor elastic, which imports all of them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = {"elastic", "teachers", "students", "losses", "configs"}
DATA_LIBRARIES = {"datasets", "einops", "gguf", "huggingface_hub", "numpy", "PIL", "pyarrow", "safetensors", "yaml"}

ALLOWED = {
    "configs": set(),
    "losses": {"torch"},
    "students": {"torch", "triton", "einops", "transformers", "timm", "safetensors", "packaging"},
    "teachers": {"configs", "torch", "torchvision", "transformers", "accelerate", "timm", *DATA_LIBRARIES},
}
"""Packages that each package may import, besides the standard library and itself."""


def imported_packages(source: str) -> set[str]:
    """Return the top-level packages that a module imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package: str) -> None:
    modules = sorted((ROOT / package).rglob("*.py"))
    assert modules, f"no modules in {package}/"
    may = ALLOWED[package] | {package} | sys.stdlib_module_names
    strays = {str(m.relative_to(ROOT)): imported_packages(m.read_text(encoding="utf-8")) - may for m in modules}
    assert not {module: names for module, names in strays.items() if names}


def test_no_arrow_points_back() -> None:
    assert {package: ALLOWED[package] & PROJECT for package in ALLOWED} == {
        "configs": set(),
        "losses": set(),
        "students": set(),
        "teachers": {"configs"},
    }


def test_the_rule_sees_every_form_of_import() -> None:
    source = "import torch.nn as nn, os\nfrom elastic.cli import main\nfrom . import x\ndef f():\n    import timm"
    assert imported_packages(source) == {"torch", "os", "elastic", "timm"}


@pytest.mark.parametrize("module", ["elastic", "elastic.cli"])
def test_importing_the_command_line_loads_no_heavy_library(module: str) -> None:
    heavy = {"torch", "transformers", "timm", "datasets", "accelerate", "torchvision", "matplotlib"}
    code = f"import sys, {module}; print(*({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []
