"""Runs of vision-language models from start to end, on tiny models, images and questions made here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing

import teachers
from elastic import trainer
from elastic.bench import bench_run, workload_of
from elastic.cli import main
from elastic.evaluate import measure_run
from elastic.families import vision_language
from elastic.run import Run, load
from losses import forward_kl
from teachers.data import prompts as reading
from teachers.data.questions import load_all, load_questions
from teachers.families.vision_language import CHAT_TEMPLATE
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
from tests.elastic.test_budgets import check_lowest_budget
from tests.pico.language import RUN_SETTINGS
from tests.pico.processors import make_processor
from tests.pico.vision_language import make_vlm


@pytest.fixture(scope="module")
def configure(configure_questions: Configure) -> Configure:
    return configure_questions


def test_training_on_questions_from_a_cache(finished: Path, tmp_path: Path):
    assert_a_cache_changes_nothing(shutil.copytree(finished, tmp_path / "run"), samples=16)


@torch.no_grad()
def test_a_run_reaches_its_budget_and_says_how_good_it_is(finished: Path) -> None:
    run, row = Run.open(finished), Run.open(finished).about["result"]
    assert row["compute"] == pytest.approx(0.7, abs=0.04)  # with 16 image tokens, compute changes in large steps
    assert row["questions"] == 6 and row["broken"] == 0 and 0 < row["image_tokens_kept"] < 1
    assert 0 < row["compute_vision"] < 1
    teacher = run.teacher()
    student, held_out = run.load_student(teacher), vision_language.load(run.config, teacher).held_out
    prompts, samples = held_out.read(range(6))
    decisions, valid = student.features(**prompts.inputs)[1], prompts.inputs["attention_mask"].bool()
    macs, _, dense = (x.sum() for x in student.spent(decisions, prompts.image, valid, prompts.answers.sum(1)))
    assert row["compute"] == pytest.approx(float(macs / dense), rel=1e-4)
    student.runtime.execution = "mask"
    own = student(**prompts.inputs)[0].logits
    with student.teacher():
        exact = student(**prompts.inputs)[0].logits
    kl = forward_kl(own[prompts.answers], exact[prompts.answers]).mean()
    assert row["kl"] == pytest.approx(float(kl), rel=1e-3)
    choices, right = held_out.questions.choices, [answer for *_, answer in samples]
    first, begins = [teacher.processor.tokenizer.encode(one)[0] for one in choices], prompts.answers.int().argmax(1)
    said, known = (
        [choices[n] for n in logits[torch.arange(6), begins][:, first].argmax(1).tolist()] for logits in (own, exact)
    )
    for name, one, other in (("accuracy", said, right), ("teacher_accuracy", known, right), ("agreement", said, known)):
        assert row[name] == sum(a == b for a, b in zip(one, other, strict=True)) / 6, name


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


def test_a_run_that_was_stopped_ends_like_one_that_was_not(finished: Path, configure: Configure, tmp_path: Path):
    assert_stopping_changes_nothing(finished, configure(), tmp_path / "run", vision_language)


def test_one_run_serves_a_range_of_budgets(
    configure: Configure, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(configure(budget__target="0.6:1.0"), tmp_path / "run")
    found = measure_run(str(tmp_path / "run"), compute=[0.6, 0.8, 1.0], say=silent)
    assert [row["compute"] for row in found] == pytest.approx([0.6, 0.8, 1.0], abs=0.04)
    assert found[-1]["kl"] == pytest.approx(0, abs=1e-6)
    assert main(["eval", str(tmp_path / "run"), "--compute", "0.3"]) == 2
    assert "from 0.600 to 1.000" in capsys.readouterr().err


def test_only_routers_are_trained_and_saved(finished: Path) -> None:
    assert_only_routers_learned(finished)


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
    row = distill(config, tmp_path / "run")
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
    asked.choices = ("w3 w2", "w3 w4")  # the first token is the same: scores cannot tell them apart
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
    llava_folder: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = teachers.load(str(llava_folder), dtype=torch.float32)
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


def test_a_question_that_is_longer_than_the_positions_is_left_out(
    llava_folder: Path, questions: Path, tmp_path: Path
) -> None:
    rows = [{"image": str(questions / "0.png"), "question": "w1 " * words, "answer": "w2"} for words in (3, 128, 4)]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = load_all(str(tmp_path / "some.jsonl"))
    prompts = vision_language._prompts(teachers.load(str(llava_folder), dtype=torch.float32), asked)
    assert len(prompts.read_readable(range(3))[1]) == 2
    ((name, reason),) = asked.left_out.reasons.items()
    assert name.endswith("line 2") and reason.endswith(" tokens, and the model reads at most 128")


def test_a_layer_that_the_vision_tower_does_not_have(llava_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(llava_folder, tmp_path / "llava")
    config = json.loads((folder / "config.json").read_text())
    for layer in (99, -4, [-1, 3]):
        (folder / "config.json").write_text(json.dumps({**config, "vision_feature_layer": layer}))
        with pytest.raises(ValueError, match=r"vision_feature_layer is .*, and the vision tower has 2 blocks"):
            teachers.load(str(folder))


def test_text_with_an_image_token_and_an_answer_without_one_are_refused(llava_folder: Path, questions: Path) -> None:
    teacher = teachers.load(str(llava_folder), dtype=torch.float32)
    sample = (*load_all(str(questions)).read([0])[0][:2], "")
    token = teacher.model.config.image_token_id
    assert int(reading.encode(teacher.processor, [sample], token).answers.sum()) == 1  # the end token alone
    for said in (["<file_sep> w1", "w2"], ["w1", "w2<file_sep>"]):
        with pytest.raises(ValueError, match="question or answer holds <file_sep>, which stands for an image"):
            reading.encode(teacher.processor, [(sample[0], *said)], token)
    for other, name in ((5, "w2"), (32000, "no token")):  # 32000 is LlavaConfig's default
        with pytest.raises(ValueError, match=rf"image_token_id in config.json is {other} \({name}\), which"):
            reading.encode(teacher.processor, [sample], other)
    teacher.processor.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="an answer has no token"):
        reading.encode(teacher.processor, [sample], token)


def test_a_chat_templates_own_bos_is_not_doubled(llava_folder: Path, questions: Path) -> None:
    teacher = teachers.load(str(llava_folder), dtype=torch.float32)
    processor, token = teacher.processor, teacher.model.config.image_token_id
    tokenizer = processor.tokenizer
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    samples = load_all(str(questions)).read([0, 1])
    plain = reading.encode(processor, samples, token)
    processor.chat_template = "<s>" + CHAT_TEMPLATE
    ours = reading.encode(processor, samples, token)
    assert (plain.inputs["input_ids"] == 2).sum(1).tolist() == [1, 1]
    assert torch.equal(ours.inputs["input_ids"], plain.inputs["input_ids"]) and torch.equal(ours.answers, plain.answers)


def test_odd_questions_end_no_run(
    configure: Configure, questions: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images that cannot be read or used, in batches of their own, and a record without an image are left out."""
    rows = [json.loads(line) for line in (questions / "train.jsonl").read_text().splitlines()]
    rows = [{**row, "image": str(questions / row["image"])} for row in rows]
    (tmp_path / "broken.png").write_bytes(b"")
    Image.new("RGB", (1, 500)).save(tmp_path / "long.png")
    odd = {"image": "broken.png"}, {"image": "long.png"}, {}
    rows[3:3] = [{**image, "question": "w1", "answer": "w2"} for image in odd]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said: list[str] = []
    config = configure("train.batch=1", "train.steps=30", data__source=str(tmp_path / "train.jsonl"))
    trainer.distill(config, tmp_path / "run", say=said.append)
    left_out = {str(tmp_path / name) for name in ("broken.png", "long.png", "train.jsonl, line 6")}
    assert set(Run.open(tmp_path / "run").about["left_out"]) == left_out
    numbers = [line.split(" of ", 2)[:2] for line in (*said, *caplog.messages) if " are left out: " in line]
    assert sorted(numbers) == [["1", "27 records"], ["data: 2", "26 questions"]]


def test_answers_are_where_the_mask_says(llava_folder: Path, questions: Path) -> None:
    teacher = teachers.load(str(llava_folder), dtype=torch.float32)
    assert teacher.family == "vlm"
    samples = load_all(str(questions)).read([0, 1])
    prompts = reading.encode(teacher.processor, samples, teacher.model.config.image_token_id)
    ids, tokenizer = prompts.inputs["input_ids"], teacher.processor.tokenizer
    assert prompts.image.sum(1).tolist() == [16, 16]
    for row, (_, _, answer) in enumerate(samples):
        told = ids[row, 1:][prompts.answers[row, :-1]]
        assert tokenizer.decode(told).split() == [answer, "<|im_end|>"]
        assert not (prompts.prompt[row, 1:] & prompts.answers[row, :-1]).any()


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


def test_timing_stays_within_the_positions(finished: Path) -> None:
    """A tiny LLaVA has 128 positions, of which a question with its image takes 20 or 21."""
    run = Run.open(finished)
    teacher, config = run.teacher(), run.config
    student, timing = run.load_student(teacher, prepare=False), vision_language.timing
    data = vision_language.load(config, teacher)
    for asked, new in ((None, 128 - 21 - 4), (200, 200)):
        workload = workload_of(config, batch=[1, 4], new_tokens=asked)
        assert timing.fitted(student, data, workload).new_tokens == new


def test_the_command_line_speaks_of_questions(
    finished: Path, questions: Path, llava_folder: Path, capsys: pytest.CaptureFixture[str]
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
        ([*asked, "--image", str(questions)], f"{questions} cannot be read: Is a directory"),
        (["distill", "--model", str(llava_folder)], "needs questions about images"),
        (
            ["distill", "--model", str(llava_folder), "--data", str(questions), "--preset", "static"],
            "there is none: use --set calibration.windows=0",
        ),
        (["distill", "--model", str(llava_folder), "--data", "nowhere/at/all"], "no such file or folder"),
        (["distill", "--model", str(llava_folder), "--data", str(questions / "0.png")], "unknown kind of file"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_hybrid_model_reads_images_or_texts_alone(
    questions: Path, text_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of Qwen3.5 the data says which; a run remembers it."""
    make_vlm("qwen3_5").save_pretrained(tmp_path / "model")
    make_processor("qwen3_5").save_pretrained(tmp_path / "model")
    asked, told = str(tmp_path / "asked"), str(tmp_path / "told")
    common = ["distill", "--model", str(tmp_path / "model"), "--target-compute", "0.97"]
    settings = as_options([*FEW_STEPS, "data.held_out=4", "calibration.windows=4", "train.precision=float32"])
    assert main([*common, "--data", str(questions), "--output", asked, *settings]) in (0, 3)
    assert main([*common, "--data", str(text_file), "--output", told, *as_options(RUN_SETTINGS)]) == 0
    row = Run.open(asked).about["result"]
    assert 0.95 < row["compute"] < 0.99 and 0 < row["image_tokens_kept"] < 1 and row["questions"] == 4
    assert [type(load(run)).__name__ for run in (asked, told)] == ["VisionLanguageStudent", "LanguageStudent"]
    assert main(["eval", asked, "--compute", "1.0"]) == main(["eval", told]) == 0
    prompt = ["--prompt", "w5 w6", "--max-new-tokens", "3"]
    assert (
        main(["generate", asked, *prompt, "--image", str(questions / "1.png")])
        == main(["generate", told, *prompt])
        == 0
    )
    assert "compute 0.9" in capsys.readouterr().err
    processor = Run.open(asked).teacher().processor
    assert reading.prompt_text(processor, "w5").endswith("w60 w61 ")  # thoughts are ended before they begin


def test_the_lowest_budget(configure: Configure, tmp_path: Path) -> None:
    check_lowest_budget("default", {"default": ()}, configure, tmp_path)
