"""The estimates of `elastic plan`, against FLOPs and memory measured on small models."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from elastic import families
from elastic.cli import main
from elastic.cli.measuring import _duration, _size
from elastic.config import RunConfig
from elastic.plan import step_bytes, step_flops
from elastic.shape_config import plan_config
from students import Student, elasticize
from students.flops import ATTENTION
from teachers import hub
from teachers.registry import models
from teachers.shapes import build, find_shape
from tests.pico.language import TINY_HYBRIDS, make_tiny

WINDOW = 128


class Watch(TorchDispatchMode):
    """A mode that counts FLOPs (`flops`) and the largest number of bytes of new tensors alive at a time (`peak`)."""

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


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize(("rows", "phase"), [(2, "decode"), (8, "prefill")])
def test_a_step_takes_what_is_estimated(rows: int, phase: str, again: bool):
    config = plan_config("llama3-8b", settings=[f"budget.phase={phase}"])
    sizes = dict(hidden_size=256, intermediate_size=896, num_hidden_layers=6, num_attention_heads=8)  # real proportions
    model = make_tiny("llama", **sizes, num_key_value_heads=2, vocab_size=4096, max_position_embeddings=WINDOW)
    student = elasticize(model.requires_grad_(False), config.student)
    if again:
        student.checkpoint_blocks()
    windows = torch.randint(3, 4000, (rows, WINDOW), generator=torch.Generator().manual_seed(0))
    config = replace(config, train=replace(config.train, window=WINDOW))
    compare(student, config, windows, rows)


def compare(student: Student, config: RunConfig, batch: Any, rows: int) -> None:
    """Assert that a training step's measured FLOPs are within 10 % of the estimate, and its memory within 33 %."""
    family = families.of(config.family)
    objective = family.Distillation(student, config.loss, config.budget, config.data).train()
    sizes = family.timing.step_sizes(student, config)
    with Watch() as seen:
        objective(batch, 1.0)[0].backward()
    assert seen.flops == pytest.approx(step_flops(student, rows, sizes), rel=0.1)
    assert seen.peak == pytest.approx(step_bytes(student, rows, sizes), rel=0.33)


ROUTED = [{"kind": "image"}, {"kind": "head", "part": "vision"}]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tiny-vit", {"embed_dim": 192, "depth": 8}),
        ("tiny-vit", {"embed_dim": 192, "depth": 8, "again": True}),
        ("tiny-vlm", {}),
        ("tiny-vlm", {"routers": ROUTED}),
    ],
)
def test_a_step_with_images_takes_what_is_estimated(name: str, settings: dict[str, Any]):
    settings = dict(settings)
    again, routers = settings.pop("again", False), settings.pop("routers", None)
    shape = find_shape(name)
    if shape.timm is not None:
        shape = replace(shape, timm={**shape.timm, **settings})
    else:
        text = {**(shape.config or {})["text_config"], "hidden_size": 256, "intermediate_size": 896}
        shape = replace(shape, config={**(shape.config or {}), "text_config": text})
    chosen = [] if routers is None else [f"student.routers={json.dumps(routers)}"]
    config = plan_config(name, settings=["train.batch=8", "data.held_out=8", *chosen])
    model = build(shape, torch.float32, "cpu")
    student = elasticize(model, config.student)
    if again:
        student.checkpoint_blocks()
    family = families.of(config.family)
    batch = family.timing.training_batch(student, family.random_data(config, model), config)
    compare(student, config, batch.sample, 8)


def planned(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.thorough
def test_models_of_eight_to_405_billion_parameters(capsys: pytest.CaptureFixture[str]):
    small, large, huge = (
        planned("--model", name, "--gpus", 8, capsys=capsys) for name in ("llama3-8b", "llama3-70b", "llama3.1-405b")
    )
    assert small["fits"] and not large["fits"] and not huge["fits"]
    assert small["spread"]["fits"] and large["spread"]["fits"] and not huge["spread"]["fits"]
    assert small["weights"] == 2 * 8_030_261_248
    head = 2 * 128_256 * 8192  # its bytes: more than a block's, like the embedding's
    assert large["spread"]["weights"] == large["weights"] // 8 + 2 * head
    for found in (small, large, huge):
        assert found["needed"] == 80e9 - found["free"] and found["batch"] == 8 and found["rows"] == 1
        # three passes (teacher, student forward, backward) at 2 FLOPs per parameter, less the embedding, plus attention
        assert 5.2 < found["flops_per_token"] / found["parameters"] < 6.3
    twice = planned("--model", "llama3-8b", "--gpus", 16, "--set", "train.batch=16", capsys=capsys)
    assert twice["days"] == pytest.approx(small["days"] / 2, rel=1e-3)


def test_a_table_and_what_is_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--model", "llama3-70b", "--gpus", "8", "--memory", "80"]) == 0
    said = capsys.readouterr().out
    assert "141.11 GB a GPU" in said and "no: every GPU has all weights" in said and "fits" in said
    assert _size(123_456) == "0.12 MB" and _size(1.5e10) == "15.00 GB"
    assert " hours" in said and _duration(2.5) == "2.5 days" and _duration(0.004) == "5.76 minutes"
    assert main(["plan", "--model", "llama3-8b", "--tokens", "1000"]) == 0 and " 1 step, " in capsys.readouterr().out
    assert main(["plan", "--model", "vit-small", "--samples", "1", "--set", "train.batch=1"]) == 0
    said = capsys.readouterr().out
    assert " 1 image of 197 tokens, 1 a GPU " in said and " 1 image, 197 tokens " in said
    for arguments in (["--model", "llama3-8b", "--share", "40"], ["--model", "llama3-9b"], ["--model", "timm/foo"]):
        assert main(["plan", *arguments]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    for flag, given, limit in (("tokens", "nan", "above 0"), ("gpus", "0", "above 0"), ("share", "40", "at most 1")):
        assert main(["plan", "--model", "tiny-llm", f"--{flag}", given]) == 2
        said = capsys.readouterr().err
        assert f"--{flag} is {given}; it must be above 0" in said and limit in said
    for name, flag in (("tiny-vit", "tokens"), ("tiny-vlm", "tokens"), ("tiny-llm", "samples")):
        assert main(["plan", "--model", name, f"--{flag}", "1e6"]) == 2
        assert f"instead of --{flag}" in capsys.readouterr().err


def test_models_that_read_images(capsys: pytest.CaptureFixture[str]):
    for found in (planned("--model", name, capsys=capsys) for name in ("vit-large", "vit-small")):
        assert found["parameters"] == models()[found["model"]].parameters
        assert found["fits"] and found["spread"]["fits"]
        assert (found["unit"], found["length"], found["steps"]) == ("images", 197, 15_625)
        assert 5.5 < found["flops_per_token"] / found["parameters"] < 6.5
    llava = planned("--model", "llava-1.5-7b", "--samples", 665_000, capsys=capsys)
    assert (llava["unit"], llava["length"], llava["samples"]) == ("questions", 576 + 64, 665_000)
    # no backward pass through the tower, and hardly any of the LM head's positions are computed
    assert 5.2 < llava["flops_per_token"] / llava["parameters"] < 6.3


def test_models_that_only_a_configuration_says_the_sizes_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    for name in ("vit-fashion", "vlm-easyvqa"):
        assert planned("--model", name, capsys=capsys)["parameters"] == models()[name].parameters
    tower = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, patch_size=32)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": tower, "text_config": {}}))
    found = planned("--model", tmp_path, capsys=capsys)
    assert (found["length"], found["parameters"]) == (50, models()["clip-base"].parameters)
    for name in ("granite4", "lfm2_moe"):  # an infinite number; a block that has neither attention nor a dense MLP
        kind, settings = TINY_HYBRIDS[name]
        getattr(transformers, kind)(**settings).save_pretrained(tmp_path / name)
        assert main(["plan", "--model", str(tmp_path / name)]) == 2
        assert f"data.window is 512, but {tmp_path / name} reads at most 64 tokens" in capsys.readouterr().err
        windows = "--set", "data.window=64", "--set", "train.window=64"
        assert planned("--model", tmp_path / name, *windows, capsys=capsys)["fits"]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "text_config": {}}))
    for kind in ("llama", "vit"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "config.json").write_text(json.dumps({"model_type": kind}))
        assert main(["plan", "--model", str(tmp_path / kind)]) == 2
        assert "config.json does not say how large the model is (none of hidden_size" in capsys.readouterr().err
    monkeypatch.setattr(hub, "config_file", lambda _: None)
    monkeypatch.setattr(hub, "unreachable", lambda: "no network")
    for name, why in ((str(tmp_path), "of LLaVA alone"), ("org/model", "cannot be downloaded: no network")):
        assert main(["plan", "--model", name]) == 2
        said = capsys.readouterr().err
        assert why in said and said.count("\n") == 1
