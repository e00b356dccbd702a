"""Zero-shot tasks of lm-evaluation-harness: scores are those of the model alone, whatever else is in the batch."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.pico.language import make_tiny, make_tokenizer
from tests.pico.routers import draw_parameters

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is missing: pip install 'elastic-distill[tasks]'")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from elastic import tasks
from elastic.cli import main
from elastic.harness.questions import questions
from students import elasticize
from students.families.language import LanguageStudent
from students.spec import LoraSpec, RouterSpec, StudentSpec
from tests.elastic.runs import silent

RUN = ("calibration.windows=8",)
SPECS = {
    "default": StudentSpec((RouterSpec("channel"), RouterSpec("vocab")), LoraSpec(4)),
    "tokens": StudentSpec((RouterSpec("token", kv="drop", substitute=4),)),
    "sequence": StudentSpec((RouterSpec("token", granularity="sequence"), RouterSpec("head", granularity="sequence"))),
    "topk": StudentSpec((RouterSpec("token", selection="topk", weight="score"), RouterSpec("expert", groups=4))),
}


def make_student(name: str) -> LanguageStudent:
    """Return a tiny student whose gates depend on the text."""
    student = elasticize(make_tiny("llama"), SPECS[name])
    draw_parameters(student, 0.5, seed=0)
    with torch.no_grad():
        for key, layer in student.model.named_modules():
            if key.endswith("routers.channel"):
                layer.log_limit.sub_(0.5)
    return student


def words(draw: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{draw.randrange(100)}" for _ in range(draw.randint(low, high)))


def make_requests(count: int = 12) -> list[Instance]:
    """Return requests with four choices per context: some of one word, and two that differ in the last word only."""
    draw, pairs = random.Random(0), []
    for number in range(count):
        context, first = words(draw, 3, 12), words(draw, 1, 4)
        choices = [first, first + " w7", first + " w8", words(draw, 1, 1)]
        pairs += [(context if number else "", " " + choice) for choice in choices]
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def make_file(path: Path, count: int = 20, blank: bool = False) -> Path:
    draw = random.Random(1)
    records = []
    for _ in range(count):
        question = words(draw, 3, 8) + (" _ " + words(draw, 2, 4) if blank else "")
        choices = [words(draw, 1, 3) for _ in range(draw.randint(2, 4))]
        records.append({"question": question, "choices": choices, "answer": draw.randrange(len(choices))})
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def test_the_teachers_scores_are_those_of_the_harness_own_model():
    requests, tokenizer = make_requests(), make_tokenizer(words=117)
    reference = HFLM(pretrained=make_tiny("llama"), tokenizer=tokenizer, batch_size=5).loglikelihood(requests)
    scorer = tasks.Scorer(make_student("default"), tokenizer)
    with scorer.student.teacher():
        scores = scorer.loglikelihood(requests)
    assert torch.tensor([s for s, _ in scores]).allclose(torch.tensor([s for s, _ in reference]), atol=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in reference]


@pytest.mark.parametrize("name", SPECS)
def test_scores_depend_on_nothing_beside_their_own_text(name: str):
    requests = make_requests()
    scorer = tasks.Scorer(make_student(name), make_tokenizer(words=117))
    together = scorer.loglikelihood(requests)
    alone = [scorer.loglikelihood([request])[0] for request in requests]
    assert torch.tensor([s for s, _ in together]).allclose(torch.tensor([s for s, _ in alone]), atol=1e-4)
    with scorer.student.teacher():
        teacher = scorer.loglikelihood(requests)
    assert (torch.tensor(together) - torch.tensor(teacher)).abs().max() > 0.1  # the student does route


@pytest.mark.parametrize("name", SPECS)
def test_scores_are_log_probabilities_of_the_students_own_forward(name: str):
    student, tokenizer = make_student(name), make_tokenizer(words=117)
    scorer = tasks.Scorer(student, tokenizer)
    context, continuation = "w1 w2 w3 w4 w5", " w6 w7"
    ids = torch.tensor([tokenizer.encode(context + continuation)])
    with torch.no_grad():
        logits, _ = student(ids[:, :-1], prompt=torch.arange(6)[None] < 5)
    steps = logits.logits.log_softmax(-1)[0, -2:]
    expected = float(steps.gather(1, ids[0, -2:, None]).sum())
    score, greedy = scorer.loglikelihood([Instance("loglikelihood", {}, (context, continuation), 0)])[0]
    assert score == pytest.approx(expected, abs=1e-4)
    assert greedy == bool((steps.argmax(-1) == ids[0, -2:]).all())


def test_long_contexts_lose_their_beginning_and_long_choices_are_refused():
    scorer = tasks.Scorer(make_student("default"), make_tokenizer(words=117))  # reads up to 64 tokens
    long = " ".join(["w9"] * 80)
    pairs = [(f"w1 {long}", " w3 w4"), (f"w2 {long}", " w3 w4"), ("w1", " " + long)]
    first, second, third = (Instance("loglikelihood", {}, pair, 0) for pair in pairs)
    assert scorer.loglikelihood([first]) == scorer.loglikelihood([second])
    with pytest.raises(ValueError, match="80 tokens, too many for this model"):
        scorer.loglikelihood([third])


def test_compute_is_that_of_the_text(finished: Path, tmp_path: Path):
    file = str(make_file(tmp_path / "own.jsonl"))
    budgets = (0.75, 0.85, 1.0)
    rows = dict(zip(budgets, tasks.score_run(str(finished), [file], compute=budgets, say=silent), strict=True))
    low, high, whole = rows.values()
    assert 0.6 < low["compute"] < high["compute"] < 1.0 < low["compute_prefill"]
    assert whole["compute"] == whole["compute_prefill"] == whole["agreement"] == 1.0
    assert [row["compute_target"] for row in rows.values()] == [0.75, 0.85, 1.0]
    for name in ("accuracy", "accuracy_norm", "accuracy_stderr", "accuracy_norm_stderr"):
        assert whole[name] == whole[f"teacher_{name}"] == low[f"teacher_{name}"]
    assert {row["task"] for row in rows.values()} == {"own"} and {row["examples"] for row in rows.values()} == {20}


def test_accuracy_is_counted_by_the_preferred_choice(tmp_path: Path):
    file = make_file(tmp_path / "own.jsonl")
    task = tasks.load_tasks([str(file)])["own"]
    scorer = tasks.Scorer(make_student("default"), make_tokenizer(words=117))
    row, preferred = tasks._ask(scorer, "own", task, 12)
    records = questions(file)[:12]
    assert len(preferred) == 12
    assert row["accuracy"] == sum(a == r["answer"] for a, r in zip(preferred, records, strict=True)) / 12
    for record, choice in zip(records, preferred, strict=True):
        pairs = [(f"Question: {record['question']}\nAnswer:", f" {c}") for c in record["choices"]]
        scores = scorer.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
        assert scores[choice] == max(scores)


def test_blanks_are_filled_and_what_follows_is_scored(tmp_path: Path):
    file = make_file(tmp_path / "blanks.jsonl", blank=True)
    task = tasks.load_tasks([str(file)])["blanks"]
    task.build_all_requests(limit=1)
    record = questions(file)[0]
    before, after = record["question"].split("_")
    assert [r.args for r in task.instances] == [(before + choice, after.rstrip()) for choice in record["choices"]]
    scorer = tasks.Scorer(make_student("default"), make_tokenizer(words=117))
    row, preferred = tasks._ask(scorer, "blanks", task, None)
    right = [a == r["answer"] for a, r in zip(preferred, questions(file), strict=True)]
    assert row["accuracy"] == sum(right) / 20 and "accuracy_norm" not in row


@pytest.mark.parametrize(
    ("question", "pairs"),
    [
        ("The sun rises in the _", [("The sun rises in the", " east"), ("The sun rises in the", " west")]),
        ("The sun rises in the ____.", [("The sun rises in the", " east"), ("The sun rises in the", " west")]),
        ('"Due _" ', [('"Due', " east"), ('"Due', " west")]),
        ("_", [("", "east"), ("", "west")]),
        ("(_)", [("(", "east"), ("(", "west")]),
        ("_ is where it rises. ", [("east", " is where it rises."), ("west", " is where it rises.")]),
        ("In the _'s light", [("In the east", "'s light"), ("In the west", "'s light")]),
        ("Go ___ , then 2 miles", [("Go east", " , then 2 miles"), ("Go west", " , then 2 miles")]),
    ],
)
def test_what_is_scored_depends_on_the_choice(question: str, pairs: list[tuple[str, str]], tmp_path: Path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": question, "choices": ["east", "west"], "answer": 1}))
    task = tasks.load_tasks([str(tmp_path / "own.jsonl")])["own"]
    task.build_all_requests()
    assert [request.args for request in task.instances] == pairs
    scorer = tasks.Scorer(make_student("default"), make_tokenizer(words=117))
    if question == "(_)":  # the tokenizer reads the whole text as one word
        with pytest.raises(ValueError, match="nothing can be scored of 'east'"):
            tasks._ask(scorer, "own", task, None)
        return
    row, _ = tasks._ask(scorer, "own", task, None)
    assert ("accuracy_norm" in row) == (pairs[0][1] != pairs[1][1])


@pytest.mark.parametrize("question", ["What does foo_bar do?", "Is __init__ called?", "_ and _", "No blank"])
def test_words_with_underscores_are_no_blanks(question: str, tmp_path: Path):
    (tmp_path / "own.jsonl").write_text(json.dumps({"question": question, "choices": ["w1", "w2"], "answer": 1}))
    task = tasks.load_tasks([str(tmp_path / "own.jsonl")])["own"]
    task.build_all_requests()
    assert [request.args for request in task.instances] == [
        (f"Question: {question}\nAnswer:", " w1"),
        (f"Question: {question}\nAnswer:", " w2"),
    ]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"question": "q", "choices": ["a", "b"]}',
        '{"question": "q", "choices": ["a"], "answer": 0}',
        '{"question": "q", "choices": ["a", ""], "answer": 0}',
        '{"question": "q", "choices": ["a", " "], "answer": 0}',
        '{"question": "q", "choices": ["a", null], "answer": 0}',
        '{"question": "q", "choices": "ab", "answer": 0}',
        '{"question": "q", "choices": ["a", "b"], "answer": 2}',
        '{"question": "q", "choices": ["a", "b"], "answer": -1}',
        '{"question": "q", "choices": ["a", "b"], "answer": true}',
        '{"question": "q", "choices": ["a", "b"], "answer": "a"}',
        '{"question": " ", "choices": ["a", "b"], "answer": 1}',
    ],
)
def test_a_bad_line_is_named(line: str, tmp_path: Path):
    file = make_file(tmp_path / "own.jsonl", count=2)
    file.write_text(f"{file.read_text()}\n\n{line}\n")
    with pytest.raises(ValueError, match=r"own.jsonl, line 4: a JSON object is expected") as error:
        questions(file)
    assert "\n" not in str(error.value)


def test_choices_that_are_the_same_are_refused(tmp_path: Path):
    """Their order alone would decide which of them counts as right."""
    (tmp_path / "own.jsonl").write_text('{"question": "q", "choices": ["a", "b", "a "], "answer": 0}')
    with pytest.raises(ValueError, match=r"own.jsonl, line 1: two of its choices are the same: a, b, a"):
        questions(tmp_path / "own.jsonl")


def test_choices_are_read_as_they_are_meant(tmp_path: Path):
    rows = [
        '\ufeff{"question": "q\u2028", "choices": [1, 2.5], "answer": 1}',
        "",
        '{"question": "q", "choices": ["a ", " b"], "answer": 0}\r',
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(rows), encoding="utf-8")
    read = questions(tmp_path / "own.jsonl")
    assert [record["choices"] for record in read] == [["1", "2.5"], ["a", "b"]]


def test_tasks_of_the_harness_need_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = "dataset_path: nobody/nothing\ntest_split: test\ndoc_to_text: q\ndoc_to_target: a\n"
    for name, kind in (("theirs", "multiple_choice"), ("other", "generate_until")):
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\noutput_type: {kind}\n{settings}")
    manager = partial(TaskManager, include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)
    monkeypatch.setattr("teachers.hub.unreachable", lambda: "no network here")
    with pytest.raises(
        ValueError, match=r"data of theirs comes from the hub, .*no network here.* --tasks FILE"
    ) as error:
        tasks.load_tasks(["theirs"], silent)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no task 'thiers': did you mean theirs\?"):
        tasks.load_tasks(["thiers"], silent)
    data = json.dumps({"q": "w1", "a": "w2"})
    (tmp_path / "data.json").write_text(f"{data}\n{data}")
    local = settings.replace(
        "nobody/nothing", f"json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'data.json'}}}}}"
    )
    (tmp_path / "other.yaml").write_text(f"task: other\noutput_type: generate_until\n{local}")
    with pytest.raises(ValueError, match="other is no multiple-choice task but one of generate_until"):
        tasks.load_tasks(["other"], silent)


def test_command_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    file = str(make_file(tmp_path / "own.jsonl"))
    both = f"{file}, {make_file(tmp_path / 'blanks.jsonl', blank=True)}"
    assert main(["eval", str(finished), "--tasks", both, "--limit", "5", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["task"], row["examples"]) for row in rows] == [("own", 5), ("blanks", 5)]
    assert main(["eval", str(finished), "--tasks", f"{file},{file}"]) == 0  # counts once
    assert "teacher accuracy" in capsys.readouterr().out

    def refused(*options: str) -> str:
        assert main(["eval", str(finished), *options]) == 2
        out, err = capsys.readouterr()
        assert out == "" and "Traceback" not in err
        return err.splitlines()[-1]

    assert "no such file of questions: missing.jsonl" in refused("--tasks", "missing.jsonl")
    assert "--tasks names no task" in refused("--tasks", ",")
    assert "no task 'arc_eazy': did you mean arc_easy?" in refused("--tasks", "arc_eazy")
    (tmp_path / "other").mkdir()
    assert "two tasks are called own" in refused("--tasks", f"{file},{make_file(tmp_path / 'other' / 'own.jsonl')}")
    assert "--limit must be at least 1" in refused("--tasks", file, "--limit", "0")
    assert "--limit is for --tasks" in refused("--limit", "3")
    assert "leave --data and --baselines away" in refused("--tasks", file, "--data", file)
    monkeypatch.setattr("elastic.cli.measuring.find_spec", lambda name: None)
    assert "pip install 'elastic-distill[tasks]'" in refused("--tasks", file)
