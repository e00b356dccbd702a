"""`elastic bench` of models with random weights: the table of shapes, their memory, and speed against dense models."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from elastic import shapes as timed
from elastic.accounting.memory import Need, need_of
from elastic.bench import workload_of
from elastic.cli import main
from elastic.shape_config import shape_config
from elastic.shapes import bench_shape
from students.execution.kv_cache import cache_bytes
from students.libraries import cache_of
from teachers.registry import models
from teachers.shapes import build, find_shape, shapes
from tests.elastic.runs import silent

TINY = [name for name in shapes() if name.startswith("tiny")]
QUICK = {"repeats": 1, "say": silent}


@pytest.mark.parametrize("name", shapes())
def test_a_shape_has_the_sizes_of_the_model_that_it_is_named_after(name: str) -> None:
    model = build(find_shape(name), torch.bfloat16, "meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.bfloat16, False)}
    assert name in models() or name in TINY
    if name in models():
        assert models()[name].family == find_shape(name).family
        assert models()[name].parameters == sum(p.numel() for p in model.parameters())


def test_every_family_has_a_tiny_shape() -> None:
    assert sorted(find_shape(name).family for name in TINY) == ["llm", "vit", "vlm"]


def test_what_a_model_needs_is_what_it_takes() -> None:
    model = build(find_shape("tiny-llm"), torch.float32, "cpu")
    need = need_of(model, model)
    assert need == need_of(build(find_shape("tiny-llm"), torch.float32, "meta"), model)
    assert need.weights == sum(p.numel() * p.element_size() for p in model.parameters())
    with torch.no_grad():
        cache = cache_of(model(torch.ones(2, 7, dtype=torch.long), use_cache=True))
    assert cache_bytes(cache) == 14 * need.cache
    blocks = model.config.num_hidden_layers
    assert need.kept == blocks * need.passing and need.head == 4 * model.lm_head.weight.numel()
    assert need.backward(1) < need.calibration(1, 0) < need.calibration(1, 2)


def test_two_copies_of_a_large_model_fit_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timed, "free_memory", lambda device: 79 * 2**30)
    config = shape_config("llama3-8b")
    workload = workload_of(config, batch=[1, 4, 8, 32], tokens=[512, 2048])
    fits = timed._fits(find_shape("llama3-8b"), config, workload, torch.bfloat16, torch.device("cpu"), print)
    assert fits == (2, True)


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> Any:
    command = ["bench", "--random-weights", "--repeats", "1", *map(str, arguments)]
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_language_model(capsys: pytest.CaptureFixture[str]) -> None:
    made = run(
        *("--model", "tiny-llm", "--target-compute", 0.75, "--batch", 1, 3, "--tokens", 16, 200, "--new-tokens", 3),
        *("--set", "train.batch=1", "--set", "train.precision=float32"),
        capsys=capsys,
    )
    assert made["timed"] == "tiny-llm, random weights" and len(made["date"]) == 10
    assert made["machine"]["processor"] and {"elastic-distill", "torch", "transformers"} <= made["versions"].keys()
    rows = made["rows"]
    assert [(r["phase"], r["batch"], r["tokens"]) for r in rows] == [
        *(("prefill", 1, 16), ("prefill", 1, 200), ("prefill", 3, 16), ("prefill", 3, 200)),
        *(("decode", 1, 3), ("decode", 3, 3), ("train", 1, 256)),
    ]
    decode = rows[4]
    assert decode["compute"] == pytest.approx(0.75, abs=0.05)  # not the tokens and keys of calibration
    assert decode["predicted_speedup"] == pytest.approx(decode["dense_flops"] / decode["flops"])
    assert decode["predicted_speedup_bytes"] == pytest.approx(decode["dense_bytes"] / decode["bytes"])
    assert decode["bytes"] < decode["dense_bytes"]
    assert decode["measured_speedup"] == pytest.approx(decode["dense_seconds"] / decode["seconds"])


@pytest.mark.parametrize("name", [pytest.param("tiny-vit", marks=pytest.mark.thorough), "tiny-vlm"])
def test_images_and_questions(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--new-tokens", 2) if name == "tiny-vlm" else ()
    options += ("--set", "calibration.windows=4", "--set", "train.batch=2")
    made = run("--model", name, "--target-compute", 0.7, "--batch", 2, *options, capsys=capsys)
    first, *_, last = made["rows"]
    assert first["phase"] == ("prefill" if name == "tiny-vlm" else "classify") and last["phase"] == "train"
    assert first["compute"] == pytest.approx(0.7, abs=0.05)
    assert ("tome_seconds" in first) == (name == "tiny-vit")  # timed against ToMe at the same FLOPs


def test_a_table_with_a_header(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--model", "tiny-llm", "--random-weights", "--tokens", "8", "--new-tokens", "2"]
    assert main([*command, "--repeats", "1", "--set", "train.batch=1"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("tiny-llm, random weights; default, ") and f"torch {torch.__version__}" in out[1]
    assert out[2].split()[:3] == ["phase", "batch", "tokens"] and out[3].split()[0] == "prefill"
    assert "cache MB" in out[2] and "ToMe ms" not in out[2], "what no row has is left out"


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu_beside_a_dense_model_in_graphs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = () if name == "tiny-vit" else ("--new-tokens", 4)
    made = run("--model", name, "--batch", 1, 2, *options, "--set", "train.batch=1", capsys=capsys)
    assert made["machine"]["device"] and made["rows"][0]["dtype"] == "bfloat16"
    timed = [row for row in made["rows"] if row["phase"] in ("decode", "classify")]
    assert timed and all("tuned_speedup" in row for row in timed)  # noise may exceed the time of so few tokens


@pytest.mark.parametrize("preset", ["static", "mixture-of-depths", "router-tuning"])
def test_presets_and_settings(preset: str) -> None:
    config = shape_config("tiny-llm", preset=preset, settings=["budget.phase=prefill"], budget__target=0.85)
    rows = bench_shape(config, tokens=[32], new_tokens=2, **QUICK)
    # a timed prefill differs from what the budget counts: the head runs for one token only, and attention is causal
    assert rows[0]["preset"] == preset and 0.4 < rows[0]["compute"] < 0.95


def test_several_budgets() -> None:
    config = shape_config("tiny-llm", budget__target="0.6:1.0", settings=["train.batch=1"])
    rows = bench_shape(config, compute=[0.7, 1.0], tokens=[8], new_tokens=2, **QUICK)
    routed, dense = (row["compute"] for row in rows if row["phase"] == "decode")
    assert routed < 0.85 and dense == 1


def test_memory_is_looked_at_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    config, said, built = shape_config("tiny-llm", settings=["calibration.windows=1"]), [], []
    options = dict(tokens=[8], new_tokens=2, repeats=1, say=said.append)

    def free(amount: float) -> None:
        monkeypatch.setattr(timed, "free_memory", lambda device: amount)

    def watched(shape: Any, dtype: Any, device: Any) -> Any:
        built.append(str(device))
        return build(shape, dtype, device)

    monkeypatch.setattr(timed, "build", watched)
    monkeypatch.setattr(timed, "need_of", lambda *_: Need(weights=1000, cache=0, kept=10, passing=0, head=0))
    free(1000)
    with pytest.raises(ValueError, match=r"tiny-llm needs about .* GB, .* and 0\.0 GB are free"):
        bench_shape(config, **options)
    assert built == ["meta"]
    free(10_000)
    rows = bench_shape(config, **options)
    assert built == ["meta", "meta", "cpu", "cpu"]  # on the CPU: student, then dense model
    assert [row["phase"] for row in rows] == ["prefill", "decode"]
    assert any("no training step" in line for line in said)


def test_one_copy_of_the_weights_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    config = shape_config("tiny-llm", settings=["train.batch=1"])
    monkeypatch.setattr(timed, "need_of", lambda *_: Need(weights=10**9, cache=0, kept=1, passing=0, head=0))
    monkeypatch.setattr(timed, "free_memory", lambda device: 1_500_000_000)
    rows = bench_shape(config, tokens=[8], new_tokens=2, repeats=1, say=said.append)
    assert [row["phase"] for row in rows] == ["prefill", "decode", "train"]
    assert any("shares the student's weights" in line for line in said)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama3-9b", "--random-weights"], "did you mean llama3-8b?); there are llama3-8b, llama3.2-1b"),
        (["--model", "tiny-llm"], "add --random-weights"),
        ([], "a finished run (elastic bench RUN) or a shape"),
        (["runs/x", "--model", "tiny-llm"], "a finished run (elastic bench RUN) or a shape"),
        (["runs/x", "--target-compute", "0.7", "--random-weights"], "leave --random-weights, --target-compute away"),
        (["--model", "tiny-vit", "--random-weights", "--tokens", "8"], "--tokens has no effect on tiny-vit"),
        (["--model", "tiny-vit", "--random-weights", "--lossless"], "language models, and tiny-vit is none: leave it"),
        (["--model", "tiny-llm", "--random-weights", "--target-compute", "0.01"], "below what these routers can save"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
