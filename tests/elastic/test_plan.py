"""Estimates on paper, against what is measured of a model that runs here."""

from __future__ import annotations

import copy
import json
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from elastic.cli import main
from elastic.objectives.language import Distillation
from elastic.plan import plan_config, step_bytes, step_flops
from students import Student, elasticize
from students.flops import ATTENTION
from tests.pico.language import make_tiny

WINDOW = 128


class Watch(TorchDispatchMode):
    """FLOPs of what runs, and the most bytes of tensors made by it that are held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.now = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        packet = function.overloadpacket
        if packet in ATTENTION:
            self.flops += ATTENTION[packet](*args, **(kwargs or {}))
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given:
                self._add(x.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


@pytest.fixture(scope="module")
def student() -> Student:
    """Sizes in the proportions of real models."""
    sizes = dict(hidden_size=256, intermediate_size=896, num_hidden_layers=6, num_attention_heads=8)
    model = make_tiny("llama", **sizes, num_key_value_heads=2, vocab_size=4096, max_position_embeddings=WINDOW)
    return elasticize(model.requires_grad_(False), plan_config("llama3-8b").student)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("rows", [2, 8])
def test_a_step_takes_what_is_estimated(rows: int, again: bool, student: Student):
    """FLOPs within 10 %, memory within a third."""
    config = plan_config("llama3-8b")
    if again:
        student = copy.deepcopy(student)
        student.checkpoint_blocks()
    objective = Distillation(student, config.loss, config.budget, config.data).train()
    windows = torch.randint(3, 4000, (rows, WINDOW), generator=torch.Generator().manual_seed(0))
    with Watch() as seen:
        objective(windows, 1.0)[0].backward()
    flops, memory = step_flops(student, rows, WINDOW), step_bytes(student, rows, WINDOW)
    assert seen.flops == pytest.approx(flops, rel=0.1)
    assert seen.peak == pytest.approx(memory, rel=0.33)


def planned(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_models_of_eight_to_405_billion_parameters(capsys: pytest.CaptureFixture[str]):
    small, large, huge = (
        planned("--model", name, "--gpus", 8, capsys=capsys) for name in ("llama3-8b", "llama3-70b", "llama3.1-405b")
    )
    assert small["fits"] and not large["fits"] and not huge["fits"]
    assert small["spread"]["fits"] and large["spread"]["fits"] and not huge["spread"]["fits"]
    assert small["weights"] == 2 * 8_030_261_248
    head = 2 * 128_256 * 8192  # larger than a block, and so is the embedding
    assert large["spread"]["weights"] == large["weights"] // 8 + 2 * head
    for found in (small, large, huge):
        assert found["needed"] == 80e9 - found["free"] and found["batch"] == 8 and found["rows"] == 1
        # 2 FLOPs a parameter and forward pass, but for the embedding's, and attention's beside them
        assert 5.2 < found["flops_per_token"] / found["parameters"] < 6.3
    twice = planned("--model", "llama3-8b", "--gpus", 16, "--set", "train.batch=16", capsys=capsys)
    assert twice["days"] == pytest.approx(small["days"] / 2, rel=1e-3)


def test_a_table_and_what_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", "llama3-70b", "--gpus", "8", "--memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "141.11 GB a GPU" in said and "no: every GPU has all weights" in said and "fits" in said
    for arguments in (["--model", "tiny-vit"], ["--model", "llama3-8b", "--share", "40"], ["--model", "llama3-9b"]):
        assert main(["plan", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
