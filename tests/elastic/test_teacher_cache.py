"""The teacher cache stores a teacher's outputs for later runs, and opens only complete files of the same teacher."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from elastic import trainer
from elastic.cli import main
from elastic.distillation import checkpoints, teacher_cache
from elastic.distillation.teacher_cache import TeacherCache, digest
from elastic.run import Run
from tests.elastic.cached import assert_a_cache_changes_nothing, assert_learned
from tests.elastic.runs import Configure, silent

LAYERS = "loss.hidden_weight=0.5", "loss.hidden_layers=all"
ABOUT = {"model": "tiny", "precision": "float32", "keeps": "final-states"}


@pytest.fixture(scope="module")
def filled(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run ("run") and the teacher cache that it filled ("cache")."""
    folder = tmp_path_factory.mktemp("filled")
    trainer.distill(configure("train.batch=3"), folder / "run", teacher_cache=folder / "cache", say=silent)
    return folder


@pytest.mark.parametrize(
    ("settings", "flags", "kind", "row"),
    [
        ((), {}, "final-states", 32 * 4),
        (LAYERS, {"budget__target": "0.6:1.0"}, "layers", 4 * 32 * 4),
        (("loss.logits=topk_kl", "loss.k=5", "loss.temperature=2"), {}, "top5-at2", (6 + 5) * 4),
    ],
    ids=["final states", "layers, a range", "likeliest tokens"],
)
def test_training_on_text_from_a_cache(
    settings: tuple[str, ...], flags: dict, kind: str, row: int, configure: Configure, tmp_path: Path
):
    trainer.distill(configure(*settings, "train.batch=3", **flags), tmp_path / "run", say=silent)
    said = assert_a_cache_changes_nothing(tmp_path / "run", samples=18)
    first, second = (re.sub(r"/llama-\w+|, and the disk.*", "", line) for line in said if "holds" in line)
    size = 18 * 16 * row / 1e6
    assert first == f"teacher cache: -float32-{kind} holds 0 samples (0.00 MB); this run's take up to {size:.2f} MB"
    assert second.startswith(f"teacher cache: -float32-{kind} holds 18 samples")


def test_a_run_that_is_killed_fills_on(filled: Path, configure: Configure, tmp_path: Path):
    real, steps = checkpoints.save, []

    def killed(*args: object) -> None:
        real(*args)
        steps.append(1)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            trainer.distill(configure("train.batch=3"), tmp_path / "run", teacher_cache=tmp_path / "cache", say=silent)
    trainer.resume(tmp_path / "run", say=silent)
    assert_learned(filled / "run", tmp_path / "run")
    about = Run.open(tmp_path / "run").about["teacher_cache"]
    assert about["folder"] == str(tmp_path / "cache") and about["asked"] > 0


def test_other_batches_find_what_they_share(filled: Path, configure: Configure, tmp_path: Path):
    config = configure("train.batch=4", "train.steps=5")
    trainer.distill(config, tmp_path / "without", say=silent)
    cache = shutil.copytree(filled / "cache", tmp_path / "cache")
    trainer.distill(config, tmp_path / "run", teacher_cache=cache, say=silent)
    assert_learned(tmp_path / "without", tmp_path / "run", rtol=1e-3, atol=2e-5)
    assert Run.open(tmp_path / "run").about["teacher_cache"] == {"folder": str(cache), "found": 18, "asked": 2}


def test_a_full_disk_ends_the_keeping_but_no_run(configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(teacher_cache.shutil, "disk_usage", lambda _: usage(0, 0, teacher_cache.RESERVE + 1000))
    with pytest.raises(ValueError, match=r"take up to 0.04 MB .* has room for 0.00 MB: name a folder elsewhere"):
        trainer.distill(configure("train.batch=3"), tmp_path / "run", teacher_cache=tmp_path / "cache", say=silent)
    said: list[str] = []
    config = configure("train.batch=3")
    config = replace(config, train=replace(config.train, steps=None, minutes=0.01))
    trainer.distill(config, tmp_path / "timed", teacher_cache=tmp_path / "cache", say=said.append)
    assert sum("is full; what comes from here on is not kept" in line for line in said) == 1
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


def test_folders_and_files_of_something_else(filled: Path, model_folder: Path, text_file: Path, tmp_path: Path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    command = ["distill", "--model", str(model_folder), "--data", str(text_file), "--output", str(tmp_path / "run")]
    for folder, message in ((tmp_path, "is not a teacher cache"), (tmp_path / "thesis.txt", "is a file")):
        assert main([*command, "--teacher-cache", str(folder)]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "run").exists()
    assert main([*command, "--teacher-cache", str(tmp_path / "thesis.txt" / "cache")]) == 2
    said = f"--teacher-cache: nothing can be kept in {tmp_path}/thesis.txt/cache (Not a directory): name another folder"
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()
    (shard, *_) = (filled / "cache").rglob("*.safetensors")
    cache = TeacherCache(tmp_path / "cache", ABOUT)
    shutil.copy(shard, cache.folder)
    with pytest.raises(ValueError, match=r"is of model llama-.*, this is model tiny, precision float32"):
        TeacherCache(tmp_path / "cache", ABOUT)
    (cache.folder / shard.name).write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is damaged .*: delete it, and the teacher is asked again"):
        TeacherCache(tmp_path / "cache", ABOUT)


def test_samples_of_many_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cache = TeacherCache(tmp_path / "cache", ABOUT)
    states = torch.arange(12, dtype=torch.bfloat16).view(6, 2)
    keys = [digest(torch.tensor([number]), "w") for number in range(4)]
    cache.add(keys[:3], {"hidden": states}, [1, 3, 2])
    assert cache.find(keys[0]) is None and len(cache) == 0
    cache.flush()
    cache.flush()
    monkeypatch.setattr(teacher_cache, "SHARD", 1)
    cache.add(keys[2:], {"hidden": states[:3]}, [2, 1])  # the first key is stored already
    (cache.folder / ".abandoned.safetensors.part").touch()
    for again in (cache, TeacherCache(tmp_path / "cache", ABOUT)):
        found = [again.find(key) for key in keys]
        assert len(again) == 4 and again.size == sum(f.stat().st_size for f in cache.folder.glob("*.safetensors"))
        parts = states[:1], states[1:4], states[4:], states[2:3]
        assert all(torch.equal(one["hidden"], part) for one, part in zip(found, parts, strict=True))
    assert len({digest(torch.tensor(x)) for x in ([1, 2], [2, 1], [[1, 2]], [1.0, 2.0])}) == 4
    assert digest("ab", "c") != digest("a", "bc")
