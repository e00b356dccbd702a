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


def heavy_after(code: str) -> list[str]:
    """Return the libraries whose import takes seconds that are loaded after `code` has run in a fresh process."""
    heavy = {"torch", "transformers", "timm", "datasets", "accelerate", "torchvision", "matplotlib"}
    code = f"import sys\n{code}\nprint(*({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.parametrize("module", ["elastic", "elastic.cli"])
def test_importing_the_command_line_loads_no_heavy_library(module: str) -> None:
    assert heavy_after(f"import {module}") == []


@pytest.mark.parametrize(
    "command",
    [
        ["distill", "--model", "smollm2-135m", "--preset", "defualt"],
        ["distill", "--model", "smollm2-135m", "--target-compute", "70"],
        ["distill", "--model", "smollm2-135m", "--set", "train.steps=-1"],
        ["distill", "--model", "smollm2-135m", "--set", "student.routers=[{kind: tokn}]"],
        ["sweep", "--model", "smollm2-135m", "--target-compute", "0.5", "--set", "train.lr=fast", "--output", "none"],
        ["plan", "--model", "llama3-8b", "--set", "train.bacth=8"],
    ],
    ids=" ".join,
)
def test_a_mistake_is_found_before_a_heavy_library_is_loaded(command: list[str]) -> None:
    assert heavy_after(f"from elastic.cli import main\nassert main({command!r}) == 2") == []
