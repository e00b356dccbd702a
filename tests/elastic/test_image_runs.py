"""Runs of image models from start to end, on tiny models and images made here."""

from __future__ import annotations

import base64
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import teachers
from elastic.baselines.image import dropping_patches, merge, merging, spread
from elastic.bench import bench_run
from elastic.cli import main
from elastic.config import make_config
from elastic.evaluate import compare_runs, measure_run
from elastic.evaluation.image import compare
from elastic.families import image
from elastic.run import Run
from elastic.sweep import routing_details
from losses import forward_kl
from students import StudentSpec, elasticize, selfcheck
from students.families.image import Features, ImageStudent
from students.spec import RouterSpec
from teachers.registry import models
from tests.elastic.cached import assert_a_cache_changes_nothing
from tests.elastic.runs import (
    FEW_STEPS,
    Configure,
    as_options,
    assert_only_routers_learned,
    assert_stopping_changes_nothing,
    distill,
    silent,
)
from tests.pico.routers import draw_parameters


@pytest.fixture(scope="module")
def configure(configure_images: Configure) -> Configure:
    return configure_images


@pytest.mark.thorough
def test_training_on_images_from_a_cache(finished: Path, tmp_path: Path):
    assert_a_cache_changes_nothing(shutil.copytree(finished, tmp_path / "run"), samples=16)


@torch.no_grad()
def test_a_run_reaches_its_budget_and_says_how_good_it_is(finished: Path) -> None:
    run, row = Run.open(finished), Run.open(finished).about["result"]
    assert row["compute"] == pytest.approx(0.7, abs=0.06)  # with 16 patches, compute changes in large steps
    assert row["images"] == 8 and row["broken"] == 0
    teacher = run.teacher()
    student, held_out = run.load_student(teacher), image.load(run.config, teacher).held_out
    pixels, labels = held_out.load(range(8))
    own = student.features(pixels)[0]
    with student.teacher():
        exact = student.features(pixels)[0]
    for name, logits in (("top", own.logits), ("teacher_top", exact.logits)):
        right = logits.argsort(1, descending=True) == labels[:, None]
        assert [row[f"{name}{k}"] for k in (1, 5)] == [int(right[:, :k].sum()) / 8 for k in (1, 5)]
    assert row["agreement"] == int((own.logits.argmax(1) == exact.logits.argmax(1)).sum()) / 8
    assert row["kl"] == pytest.approx(float(forward_kl(own.logits, exact.logits).mean()), rel=1e-3)
    assert row["cosine"] == pytest.approx(float(torch.cosine_similarity(own.pooled, exact.pooled).mean()), abs=1e-5)


def test_evaluating_again_gives_the_same_answer(finished: Path, image_folder: Path) -> None:
    (row,) = measure_run(str(finished), say=silent)
    told = Run.open(finished).about["result"]
    same = ("compute", "top1", "top5", "agreement", "kl", "cosine")
    assert {key: row[key] for key in same} == {key: told[key] for key in same}
    assert measure_run(str(finished), data=str(image_folder), say=silent)[0]["images"] == 16
    (dense,) = measure_run(str(finished), compute=[1.0], say=silent)
    assert dense["compute"] == dense["agreement"] == 1 and dense["kl"] == pytest.approx(0, abs=1e-6)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(finished: Path, configure: Configure, tmp_path: Path):
    assert_stopping_changes_nothing(finished, configure(), tmp_path / "run", image)


@pytest.mark.parametrize("preset", ["mixture-of-depths", "elastiformer", "router-tuning", "static"])
def test_every_preset_runs(preset: str, configure: Configure, tmp_path: Path) -> None:
    target = 0.9 if preset == "static" else 0.8
    settings = ["calibration.windows=0"] if preset != "static" else []
    row = distill(configure(*settings, preset=preset, budget__target=target), tmp_path / "run")
    assert 0 < row["compute"] < 1.1


def test_only_routers_are_trained_and_saved(finished: Path) -> None:
    assert_only_routers_learned(finished)


def test_transformers_models_run_too(configure: Configure, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    config = transformers.ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=2)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "model")
    row = distill(configure(model=str(tmp_path / "model"), budget__target=0.8), tmp_path / "run")
    assert row["images"] == 8 and row["compute"] == pytest.approx(0.8, abs=0.06)


def test_damaged_images_end_no_run_and_are_named_once(
    image_folder: Path, timm_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "images [1]"
    shutil.copytree(image_folder, data)
    broken = [data / "train" / "cat" / "3.png", data / "train" / "dog" / "0.png", data / "val" / "cat" / "0.png"]
    for file in broken:
        file.write_bytes(b"")
    settings = ["data.held_out=8", "calibration.windows=16", *FEW_STEPS, "train.batch=1", "train.steps=60"]
    run = str(tmp_path / "run")
    arguments = ["--model", str(timm_folder), "--data", str(data), "--target-compute", "0.7", "--output", run]
    assert main(["distill", *arguments, *as_options(settings)]) == 0
    said = capsys.readouterr().err
    assert [said.count(f"left out: {file}: no image") for file in broken] == [1, 1, 1]
    assert f"data: 38 images of {data} to train on, " in said
    assert f"data: 2 of 40 images of {data / 'train'} are left out: broken, or of no use" in said
    assert set(Run.open(run).about["left_out"]) == {str(file) for file in broken}
    assert main(["eval", run, "--data", str(data), "--baselines", "tome", "random", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["images"], row["broken"], row["labelled"]) for row in rows] == [(15, 1, 15)] * 3
    assert main(["eval", run, "--data", str(data)]) == 0
    assert "15 images, 1 broken" in capsys.readouterr().out
    bench_run(run, batch=[20], repeats=1, say=silent)
    for file in (data / "val").rglob("*.png"):
        file.write_bytes(b"")
    assert main(["eval", run, "--data", str(data)]) == 2
    assert "9 of 16 images of" in capsys.readouterr().err.splitlines()[-1]


def test_batches_without_a_good_image_are_passed_over(
    finished: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("elastic.evaluation.image.MEASURED", 1)
    shutil.copytree(image_folder / "val", tmp_path / "val")
    (tmp_path / "val" / "dog" / "7.png").write_bytes(b"")
    (tmp_path / "val" / "cat" / "0.png").write_bytes(b"")
    (row,) = measure_run(str(finished), data=str(tmp_path), say=silent)
    assert (row["images"], row["broken"]) == (14, 2)


def test_an_agreement_of_nothing_is_a_value(finished: Path) -> None:
    run = Run.open(finished)
    teacher = run.teacher()
    student, held_out = run.load_student(teacher), image.load(run.config, teacher).held_out

    def contrary(pixels: torch.Tensor) -> tuple[Features, float]:
        with student.teacher():
            features, _ = student.features(pixels)
        return Features(-features.logits, features.pooled, features.layers), 1.0

    row = compare(student, held_out, contrary)
    assert row["agreement"] == 0 and row["kl"] > 0
    shown = dict(image.lines())
    assert shown["top-1 agreement"](row) == "0.00%" and "no classifier" not in shown["KL to the teacher"](row)

    def blind(pixels: torch.Tensor) -> tuple[Features, float]:
        features, compute = contrary(pixels)
        return Features(None, features.pooled, features.layers), compute

    row = compare(student, held_out, blind)
    assert not {"agreement", "kl", "top1", "labelled"} & set(row)
    assert {shown[name](row) for name in ("top-1", "top-5", "top-1 agreement")} == {"no classifier"}


def test_an_accuracy_that_cannot_be_one_says_so(
    finished: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(*names: str) -> tuple[dict, str]:
        data = tmp_path / "-".join(names)
        for place, name in enumerate(names):
            shutil.copytree(image_folder / "val" / ("cat", "dog")[place % 2], data / "val" / name)
        (data / "val" / ".ipynb_checkpoints").mkdir()
        (row,) = measure_run(str(finished), data=str(data), say=silent)
        assert main(["eval", str(finished), "--data", str(data)]) == 0
        assert "top-1  " in capsys.readouterr().out
        return row, dict(image.lines())["top-1"](row)

    whole, _ = measured("cat", "dog")
    assert whole["labelled"] == 16 and "unlabelled" not in whole
    row, line = measured("Cat", "wolf")
    alone, _ = measured("cat")
    assert row["labelled"] == alone["labelled"] == 8 and row["top1"] == alone["top1"]
    assert "of 8 images: 1 of 2 classes of the data (wolf) are none of the model's" in line
    row, line = measured("katze", "hund")
    assert row["labelled"] == 0 and not {"top1", "top5", "teacher_top1"} & set(row) and 0 <= row["agreement"] <= 1
    assert "none: 2 of 2 classes of the data (hund, katze) are none of the model's" in line


def test_baselines_cost_what_the_student_costs(finished: Path) -> None:
    rows = measure_run(str(finished), baselines=["random", "uniform", "tome"], say=silent)
    assert [row["preset"] for row in rows] == ["default", "random", "uniform", "tome"]
    assert [row["compute"] for row in rows[1:3]] == pytest.approx([rows[0]["compute"]] * 2)
    assert 0 < rows[3]["compute"] <= rows[0]["compute"]
    assert rows[0]["kl"] != rows[1]["kl"] != rows[2]["kl"]


def test_the_teacher_runs_once_for_all_that_is_measured(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(selfcheck.SWITCH, "off")  # it would run the teacher, too
    asked = []
    monkeypatch.setattr(ImageStudent, "teacher", lambda self, real=ImageStudent.teacher: asked.append(1) or real(self))
    rows = measure_run(str(finished), baselines=["random", "tome"], say=silent)
    assert len(asked) == 1  # all held-out images are one batch
    (again,) = measure_run(str(finished), say=silent)
    assert len(asked) == 2  # a new call loads student and images again
    assert {row["teacher_top1"] for row in rows} == {again["teacher_top1"]}
    assert again["kl"] == rows[0]["kl"]


def test_blind_dropping_differs_where_the_first_block_drops_nothing(timm_folder: Path) -> None:
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    kept = []
    for kind in ("random", "uniform"):
        spec = StudentSpec((RouterSpec("layer", selection="quota", kv="drop", dropped="stay"),))
        student = elasticize(teachers.load(str(timm_folder), dtype=torch.float32).model, spec)
        for number, block in enumerate(student.blocks):  # the first block keeps all patches, the others half
            block.routers["layer"].set_quota(torch.linspace(0, 1, 64) if number == 0 else torch.linspace(-1, 1, 64))
        with dropping_patches(student, kind, [pixels]), torch.no_grad():
            _, decisions = student.features(pixels)
        assert bool((decisions.share["0.layer"] == 1).all())
        kept.append(decisions.share["2.layer"])
        assert 0 < float(kept[-1].mean()) < 0.7
    assert not torch.equal(*kept) and len(kept[0].unique(dim=0)) > 1


def test_merging_keeps_the_weighted_sum_and_counts_patches() -> None:
    draw = torch.Generator().manual_seed(0)
    x, metric = torch.randn(2, 12, 8, generator=draw), torch.randn(2, 12, 4, generator=draw)
    size = torch.randint(1, 4, (2, 12, 1), generator=draw).float()
    assert torch.equal(merge(x[:, :2], metric[:, :2], None, pairs=3, prefix=1)[0], x[:, :2])  # only one patch
    merged, total = merge(x, metric, size, pairs=3, prefix=1)
    assert merged.shape == (2, 9, 8)
    torch.testing.assert_close((merged * total).sum(1), (x * size).sum(1))
    torch.testing.assert_close(total.sum(1), size.sum(1))
    assert torch.equal(merged[:, 0], x[:, 0])


def test_merging_nothing_changes_nothing(timm_folder: Path) -> None:
    model = teachers.load(str(timm_folder), dtype=torch.float32).model
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    same, share = merging(model, pixels, target=1.0)
    assert share == 1.0
    torch.testing.assert_close(same(pixels), model(pixels))
    fewer, share = merging(model, pixels, target=0.8)
    assert share <= 0.8 and fewer(pixels).shape == (2, 7)


@pytest.mark.parametrize("count", [5, 16, 49])
def test_even_distances(count: int) -> None:
    for kept in range(2, count):
        places = spread(count).topk(kept).indices.sort().values
        assert int(places.diff().max()) <= 4 * count / kept


def test_runs_can_be_compared(finished: Path) -> None:
    rows = {row["router"]: row["correlation"] for row in compare_runs(str(finished), str(finished))}
    assert set(rows) == {"1.layer", "mean"}
    assert all(value == pytest.approx(1) for value in rows.values())


def test_runs_of_different_precision_can_be_compared(finished: Path, tmp_path: Path) -> None:
    other = shutil.copytree(finished, tmp_path / "other")
    config = (other / "config.yaml").read_text()
    assert "precision: float32" in config
    (other / "config.yaml").write_text(config.replace("precision: float32", "precision: bfloat16"))
    for pair in ((finished, other), (other, finished)):
        rows = compare_runs(*map(str, pair))
        assert all(row["correlation"] == pytest.approx(1, abs=0.05) for row in rows)


def test_where_compute_goes(finished: Path) -> None:
    """Block 0 runs on all patches, later blocks on some; a picture fades where its patches skip blocks."""
    details = routing_details(str(finished), None)
    result = Run.open(finished).about["result"]
    assert (len(details["blocks"]), details["phase"]) == (3, "prefill")
    first, *later = details["blocks"]
    assert first == [1, 1] and all(0 < share < 1 for block in later for share in block)
    tokens = torch.tensor(details["tokens"]).view(3, 8, 16) / 1000
    assert (tokens[0] == 1).all() and set(tokens[2].flatten().tolist()) == {0, 1}
    assert sum(example["compute"] for example in details["examples"]) / 8 == pytest.approx(result["compute"], abs=1e-3)
    for example, patches in zip(details["examples"], tokens.mean(0), strict=True):
        original, faded = (_picture(example[key]) for key in ("original", "image"))
        assert original.mode == "RGB" and faded.mode == "RGBA" and original.size == faded.size == (112, 112)
        alpha = torch.tensor(bytearray(faded.getchannel("A").tobytes())).view(4, 28, 4, 28)
        assert torch.equal(alpha.amin((1, 3)), alpha.amax((1, 3)))
        torch.testing.assert_close(alpha[:, 0, :, 0].flatten() / 255, patches, atol=0.005, rtol=0)


def _picture(uri: str) -> Image.Image:
    head, data = uri.split(",")
    assert head == "data:image/webp;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_bench_measures_inference_and_a_step(finished: Path) -> None:
    for option in ({"tokens": [8]}, {"new_tokens": 8}):
        with pytest.raises(ValueError, match="has no effect on"):
            bench_run(str(finished), **option, say=silent)
    rows = bench_run(str(finished), batch=[1, 3], repeats=1, say=silent)
    assert [row["phase"] for row in rows] == ["classify", "classify", "train"]
    for row in rows[:2]:
        assert row["compute"] == pytest.approx(0.7, abs=0.06)
        assert row["images_per_second"] > 0


def test_recomputing_activations_changes_no_gradient(timm_folder: Path) -> None:
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for recompute in (False, True):
        torch.manual_seed(0)
        spec = StudentSpec((RouterSpec("layer", selection="quota", kv="drop", dropped="stay"),))
        student = elasticize(teachers.load(str(timm_folder), dtype=torch.float32).model, spec)
        assert isinstance(student, ImageStudent)
        draw_parameters(student, 0.1)
        student.train()
        if recompute:
            student.checkpoint_blocks()
        out, decisions = student.features(pixels)
        (out.pooled.square().sum() + sum(share.sum() for share in decisions.share.values())).backward()
        found.append([parameter.grad for parameter in student.added_parameters().values()])
    assert any(bool(grad.any()) for grad in found[0])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["vit-base-imagenet", "vit-mae-large-imagenet"])
def test_imagenet_recipes_are_complete(name: str, image_folder: Path) -> None:
    file = Path(__file__).parents[2] / "configs" / f"{name}.yaml"
    config = make_config(file=str(file), data__source=str(image_folder))
    assert config.family == "vit" and config.model in models()
    assert config.student.routers[0].selection == "quota"


def test_the_command_line_speaks_of_images(
    finished: Path, image_folder: Path, timm_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(finished), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    keys = {"top1", "teacher_top1", "top5", "teacher_top5", "agreement", "cosine", "compute", "compute_target"}
    assert keys <= set(row)
    assert main(["eval", str(finished), "--baselines", "random"]) == 0
    assert "top-1" in capsys.readouterr().out
    for arguments, message in (
        (["distill", "--model", str(timm_folder)], "needs images: --data FOLDER"),
        (["distill", "--model", str(timm_folder), "--data", "nowhere/at/all"], "no such file or folder"),
        (
            ["distill", "--model", str(timm_folder), "--set", "train.window=64", "--data", str(image_folder)],
            "no effect",
        ),
        (["generate", str(finished), "--prompt", "x"], "is an image model"),
    ):
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert message in line


def _of_another_size(kind: str, folder: Path) -> tuple[int, int]:
    """Save a model whose processor makes images of another size than it is configured for; return (height, width)."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, patch_size=4)
    if kind == "dinov2":
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes, image_size=48)).save_pretrained(folder)
        crop = {"height": 20, "width": 20}
        transformers.BitImageProcessor(size={"shortest_edge": 24}, crop_size=crop).save_pretrained(folder)
        return 20, 20
    transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=16)).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 24, "width": 16}).save_pretrained(folder)
    return 24, 16


@pytest.mark.parametrize("kind", [pytest.param("dinov2", marks=pytest.mark.thorough), "vit"])
def test_the_processor_says_how_many_tokens_there_are(
    kind: str, configure: Configure, image_folder: Path, tmp_path: Path
) -> None:
    height, width = _of_another_size(kind, tmp_path / "model")
    config = configure("student.routers=[{kind: layer, selection: quota, kv: drop}]", model=str(tmp_path / "model"))
    row = distill(config, tmp_path / "run")
    assert row["compute"] == pytest.approx(0.7, abs=0.015)
    run = tmp_path / "run"
    (again,) = measure_run(str(run), data=str(image_folder), say=silent)
    assert again["compute"] == pytest.approx(row["compute"])
    (timed, train) = bench_run(str(run), batch=[2], repeats=1, say=silent)
    assert timed["tokens"] == train["tokens"] == height // 4 * (width // 4) + 1
    assert timed["compute"] == pytest.approx(row["compute"], abs=0.01)
    found = routing_details(str(run), None)
    assert len(found["tokens"][0]) == 8 * (height // 4 * (width // 4)) and len(found["examples"]) == 8
