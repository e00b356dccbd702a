"""Runs on quantized teachers: made, resumed, opened and measured; and models whose files are quantized already."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch

import elastic
import teachers
from elastic.bench import bench_run
from elastic.evaluate import measure_run
from elastic.families import language
from elastic.generate import generate_text
from elastic.run import Run
from students.architectures.lookup import can_be_read_in_part
from teachers import quantize
from tests.elastic.runs import Configure, assert_stopping_changes_nothing, distill, silent
from tests.pico.language import make_tiny, make_tokenizer


@pytest.mark.thorough
def test_a_run_on_an_int8_base(configure: Configure, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    long = "data.window=64", "train.window=64"  # of which the first 16 tokens skip nothing
    settings = *long, "quantization=int8", "budget.phase=prefill", "budget.target=0.9"
    result = distill(configure(*settings), tmp_path / "run")
    run = Run.open(tmp_path / "run", finished=True)
    assert run.config.quantization == "int8" and run.about["identity"].endswith("-int8")
    assert run.about["source"].endswith("linear layers in int8")
    student = elastic.load(tmp_path / "run")
    assert not can_be_read_in_part(student.blocks[0].get_submodule("mlp.down_proj"))
    assert sum(p.numel() for p in student.added_parameters().values()) > 0
    again = measure_run(tmp_path / "run", say=silent)[0]
    assert again["compute_prefill"] == pytest.approx(result["compute_prefill"]) and result["compute_prefill"] < 0.95
    assert generate_text(str(tmp_path / "run"), "w1 w2 w3", max_new_tokens=3)["tokens"] == 3
    rows = bench_run(str(tmp_path / "run"), tokens=[8], new_tokens=2, repeats=1, say=silent)
    assert {row["phase"] for row in rows} == {"prefill", "decode", "train"}
    assert_stopping_changes_nothing(tmp_path / "run", configure(*settings), tmp_path / "stopped", language)
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("quantization: int8", "quantization: none"))
    with pytest.raises(ValueError, match="made for other weights"):
        elastic.load(tmp_path / "run")


def test_a_budget_of_choices_that_save_nothing_is_refused(configure: Configure, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = configure("quantization=int8", "student.routers=[{kind: channel}]")
    with pytest.raises(ValueError, match="they save nothing, so route otherwise; quantized layers run whole"):
        distill(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_missing_package_is_named(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantization=nf4 needs a package that is missing: pip install bitsandbytes"):
        teachers.load(str(model_folder), quantization="nf4")


def saved(folder: Path, method: str) -> str:
    """Save a tiny Llama that transformers has quantized, and return its folder."""
    import transformers

    make_tiny("llama", hidden_size=64, intermediate_size=64).save_pretrained(folder / "dense")
    if method == "torchao":
        config = transformers.TorchAoConfig(import_module("torchao.quantization").Int8WeightOnlyConfig())
    else:
        config = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "dense", quantization_config=config)
    model.save_pretrained(folder / method)
    make_tokenizer(words=117).save_pretrained(folder / method)
    return str(folder / method)


@pytest.mark.parametrize("method", ["torchao", "bitsandbytes"])
def test_what_is_quantized_already_is_read_as_it_is(method: str, tmp_path: Path) -> None:
    pytest.importorskip(method)
    name = saved(tmp_path, method)
    teacher = teachers.load(name, dtype=torch.float32)
    assert not can_be_read_in_part(teacher.model.model.layers[0].mlp.down_proj)
    assert teacher.identity == teachers.load(name, dtype=torch.float32).identity
    dense = teachers.load(str(tmp_path / method), dtype=torch.float32).model
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        assert torch.equal(teacher.model(ids).logits, dense(ids).logits)
    with pytest.raises(ValueError, match="is quantized already: leave quantization=int8 away"):
        teachers.load(name, quantization="int8")


def labelled(folder: Path, model_folder: Path, about: dict[str, object]) -> str:
    """Copy a model whose weights are plain, with a `quantization_config`, and return the copy's folder."""
    shutil.copytree(model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    return str(folder)


@pytest.mark.parametrize(
    ("about", "problem"),
    [
        ({"quant_method": "gptq", "bits": 4}, "is quantized by gptq, which is not read"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "llm_int8_threshold is 6.0"),
    ],
)
def test_what_is_quantized_otherwise_is_refused(
    about: dict[str, object], problem: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "find_spec", lambda name: name)
    name = labelled(tmp_path / "model", model_folder, about)
    with pytest.raises(ValueError, match=problem):
        teachers.load(name)


@pytest.mark.parametrize(
    ("method", "about"),
    [
        ("bitsandbytes", {"load_in_4bit": True}),
        ("bitsandbytes", {"load_in_8bit": True, "llm_int8_threshold": 0.0}),
        ("torchao", {}),
    ],
)
def test_plain_weights_that_are_said_to_be_quantized_are_refused(
    method: str, about: dict[str, object], model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip(method)
    name = labelled(tmp_path / "model", model_folder, {"quant_method": method, **about})
    with pytest.raises(ValueError, match=f"{method} has quantized the weights, and they are plain") as error:
        teachers.load(name)
    assert "take `quantization_config` out of config.json" in str(error.value) and "\n" not in str(error.value)


def test_image_models_too() -> None:
    pytest.importorskip("torchao")
    teacher = teachers.load("vit-fashion", quantization="int8")
    assert not can_be_read_in_part(teacher.model.blocks[3].attn.qkv) and teacher.identity.endswith("-int8")
    with torch.no_grad():
        logits = [
            model(torch.ones(1, 1, 28, 28) * torch.linspace(-1, 1, 28)).float().softmax(-1)
            for model in (teacher.model.float(), teachers.load("vit-fashion", dtype=torch.float32).model)
        ]
    torch.testing.assert_close(*logits, atol=0.02, rtol=0.1)


def test_a_model_that_has_no_room_is_refused(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loading = import_module("teachers.load")
    monkeypatch.setattr(loading, "free_bytes", lambda device: 0)
    monkeypatch.setattr(loading, "kept_bytes", lambda model, besides: 16_100_000_000)
    with pytest.raises(ValueError, match=r"takes 16.1 GB, and cpu has 0.0 GB free.*device_map"):
        teachers.load(str(model_folder), device="cpu")
