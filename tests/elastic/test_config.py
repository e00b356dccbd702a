"""Configurations are strict: settings that are unknown, mistyped, contradictory or without effect are errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from configs import presets
from elastic.config import RunConfig, TrainConfig, make_config
from elastic.settings import from_dict, to_dict
from students.spec import RouterSpec

NAMED = {"model": "smollm2-135m"}


def write(folder: Path, content: dict | str) -> str:
    file = folder / "settings.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return str(file)


def problem(**arguments: object) -> str:
    """Return the error message of make_config for these arguments, which must be a single line."""
    with pytest.raises(ValueError) as error:
        make_config(**{**NAMED, **arguments})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("preset", presets())
@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_every_preset_is_valid_and_survives_yaml(preset: str, phase: str):
    config = make_config(preset=preset, budget__phase=phase, **NAMED)
    assert config.preset == preset and config.budget.phase == phase and config.student.routers
    assert from_dict(RunConfig, yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_what_comes_later_counts(tmp_path: Path):
    file = write(tmp_path, {"train": {"lr": 0.5, "batch": 7}, "budget": {"target": 0.6, "hinge": 3.0}})
    options = dict(preset="router-tuning", file=file, settings=["train.lr=0.25"], budget__target=0.9)
    config = make_config(**NAMED, **options)
    assert config.train.limit_lr == TrainConfig().limit_lr  # from the defaults
    assert config.loss.cross_entropy_weight == 1 and config.budget.control == "capacity"  # from the preset
    assert config.train.batch == 7 and config.budget.hinge == 3  # from the file
    assert config.budget.target == 0.9 and config.train.lr == 0.25  # from the command line


def test_preset_and_model_may_be_named_in_the_file(tmp_path: Path):
    file = write(tmp_path, {"model": "gpt2", "preset": "static"})
    assert make_config(file=file).preset == "static" and make_config(file=file).model == "gpt2"
    assert make_config(file=file, preset="default").preset == "default"


def test_lists_are_replaced_not_merged():
    config = make_config(settings=["student.routers=[{kind: head}]"], budget__phase="prefill", **NAMED)
    assert config.student.routers == (RouterSpec("head"),) and config.student.lora.rank == 8


def test_prefill_section_counts_for_that_phase_only(tmp_path: Path):
    file = write(tmp_path, {"train": {"lr": 0.5}, "prefill": {"train": {"lr": 0.25, "batch": 3}}})
    decode, prefill = (make_config(file=file, budget__phase=phase, **NAMED) for phase in ("decode", "prefill"))
    assert (decode.train.lr, decode.train.batch) == (0.5, TrainConfig().batch)
    assert (prefill.train.lr, prefill.train.batch) == (0.25, 3)
    assert make_config(file=file, budget__phase="prefill", train__lr=0.1, **NAMED).train.lr == 0.1
    assert {r.kind for r in decode.student.routers} == {"mixture", "channel", "vocab"}
    assert {r.kind for r in prefill.student.routers} == {"mixture", "token"}
    assert make_config(settings=["budget.phase=prefill"], **NAMED).student == prefill.student
    file = write(tmp_path, {"prefill": {"budget": {"target": "0.6:1.0"}}})
    assert make_config(file=file, budget__phase="prefill", **NAMED).student.gains


def test_steps_and_minutes_exclude_each_other(tmp_path: Path):
    def given(**options: object) -> tuple:
        train = make_config(**NAMED, **options).train
        return train.steps, train.minutes

    assert given() == (None, TrainConfig().minutes)
    assert given(train__steps=5) == given(settings=["train.steps=5"]) == (5, None)
    assert given(file=write(tmp_path, {"train": {"minutes": 5}})) == (None, 5)
    steps = write(tmp_path, {"train": {"steps": 5}})
    assert given(file=steps) == (5, None)
    assert given(file=steps, train__minutes=2) == (None, 2)
    assert given(file=steps, settings=["train.steps=6"]) == (6, None)
    assert "leave one away" in problem(train__steps=5, train__minutes=2)
    assert "steps or train.minutes" in problem(settings=["train.minutes=null"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("train.lrr=1", ["'train.lrr'", "did you mean lr?", "limit_lr"]),
        ("trian.lr=1", ["'trian'", "did you mean train?"]),
        ("student.routers=[{kind: token, side: [attn]}]", ["'student.routers[0].side'", "did you mean sites?"]),
        ("student.routers=[{kind: tokn}]", ["student.routers[0].kind is 'tokn'", "token, head, expert"]),
        ("student.routers=[{network: mlp}]", ["student.routers[0] lacks kind"]),
        ("student.routers={kind: token}", ["student.routers is", "must be a list"]),
        ("student.routers=[token]", ["student.routers[0] is 'token'"]),
        ("student.routers=[]", ["at least one router"]),
        ("preset=statik", ["unknown preset 'statik'", "did you mean static?", "mixture-of-depths"]),
        ("preset=[1]", ["unknown preset [1]"]),
        ("prefill=3", ["prefill is 3", "section"]),
        ("budget=3", ["budget is 3", "section"]),
        ("budget=null", ["budget is None", "section"]),
        ("train=[1]", ["train is [1]", "section"]),
        ("train.lr", ["--set train.lr:", "section.key=value"]),
        ("train.lr=[", ["--set train.lr=[", "not YAML"]),
        ("train={lr: 1, lr: 2}", ["--set train={lr: 1, lr: 2}", "not YAML"]),
        ("model.name=x", ["model has a value already"]),
    ],
)
def test_unknown_settings_and_malformed_ones(settings: str, words: list[str]):
    message = problem(settings=[settings])
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("train.steps=1.5", "train.steps is 1.5; it must be a whole number"),
        ("train.batch=99999999999999999999", "train.batch is 99999999999999999999, which is too large"),
        ("data=words.txt", "data is 'words.txt'; it must be a section of settings"),
        ("train.steps=true", "train.steps is True; it must be a whole number"),
        ("train.lr=fast", "train.lr is 'fast'; it must be a finite number"),
        ("train.lr=.nan", "train.lr is nan; it must be a finite number"),
        ("train.lr=1e999", "it must be a finite number"),
        ("train.lr=true", "train.lr is True; it must be a finite number"),
        ("train.lr=null", "train.lr is None; it must be a finite number"),
        ("train.checkpointing=1", "train.checkpointing is 1; it must be true or false"),
        ("data.source=7", "data.source is 7; it must be text"),
        ("budget.phase=both", "budget.phase is 'both'; it must be one of decode, prefill"),
        ("train.precision=float16", "must be one of auto, bfloat16, float32"),
        *((f"budget.target={value}", "0.7 means 70 %") for value in (0, -1, 1.5, 70)),
        ("data.source=' '", "--data is empty"),
        ("data.window=4", "data.window"),
        ("data.held_out=0", "data.held_out"),
        ("data.max_tokens=0", "data.max_tokens"),
        ("calibration.windows=-1", "calibration.windows"),
        ("train.batch=0", "train.batch"),
        ("train.accumulation=0", "train.accumulation"),
        ("train.steps=-1", "train.steps is -1; it cannot be negative"),
        ("train.minutes=0", "train.minutes is 0.0; it must be above 0"),
        ("train.lr=-1", "train.lr is -1.0; it cannot be negative"),
        ("train.clip=0", "train.clip is 0.0; it must be above 0"),
        ("train.seed=4294967296", "train.seed is 4294967296; it must be below 2**32"),
        ("train.batch=1048576", "train.batch is 1048576; it must be below 2**20"),
        ("loss.temperature=0", "loss.temperature"),
        ("loss.beta=2", "loss.beta"),
        ("loss.k=0", "loss.k"),
        ("loss.hidden_weight=-1", "loss.hidden_weight"),
        ("budget.stiffness=-1", "budget.stiffness"),
        ("data.max_images=0", "data.max_images"),
        ("train.window=100", "must divide data.window"),
        ("student.lora.rank=-1", "lora.rank"),
    ],
)
def test_types_and_values_are_checked(setting: str, words: str):
    assert words in problem(settings=[setting])


def test_numbers_that_yaml_takes_for_text_are_numbers():
    train = make_config(settings=["train.lr=1e-3", "train.clip=2", "train.limit_lr=1E-2"], **NAMED).train
    assert (train.lr, train.clip, train.limit_lr) == (0.001, 2.0, 0.01)
    assert type(train.clip) is float


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["budget.hinge=2"], "budget.hinge is 2.0, which has no effect without budget.control=capacity"),
        (["budget.control=capacity", "budget.stiffness=2"], "without budget.control=price"),
        (["loss.beta=0.3"], "without loss.logits=jensen_shannon"),
        (["loss.k=3"], "without loss.logits=topk_kl"),
        (["loss.hidden=mse"], "without loss.hidden_weight above 0"),
        (["loss.hidden_layers=all"], "without loss.hidden_weight above 0"),
        (["loss.topk_weight=1"], "without token or layer routers with selection: topk"),
        (["loss.load_balance_weight=1"], "without head or expert routers"),
        (["data.prompt=16"], "without a router with granularity: sequence"),
        (["student.routers=[{kind: head, substitute: 4}]"], "`substitute` has no effect on a head router"),
        (["student.routers=[{kind: channel, selection: topk}]"], "`selection` has no effect on a channel router"),
        (["student.routers=[{kind: head, blocks: odd}, {kind: head, blocks: even}]"], "even if their `blocks`"),
        (["student.routers=[{kind: head, selection: topk}]"], "use budget.control=capacity"),
        (["student.routers=[{kind: token, granularity: sequence}]", "data.prompt=256"], "shorter than train.window"),
    ],
)
def test_settings_without_effect_or_against_each_other(settings: list[str], words: str):
    assert words in problem(settings=settings)


def test_settings_with_effect_are_accepted():
    for settings in (
        ["loss.logits=jensen_shannon", "loss.beta=0.3"],
        ["loss.hidden_weight=1", "loss.hidden=mse", "loss.hidden_layers=all"],
        ["student.routers=[{kind: token, granularity: sequence}]", "data.prompt=16"],
        ["student.routers=[{kind: head}]", "loss.load_balance_weight=1"],
    ):
        make_config(settings=settings, **NAMED)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [", "is not YAML: "),
        ("a: 1\nb: {", "in line 2"),
        ("a: \x00", "is not YAML: unacceptable character"),
        ("train: {}\nmodel: m\ntrain: {}", "is not YAML: train stands twice in line 3"),
        ("a: " + "[" * 2_000, "is not YAML: brackets are nested too deeply"),
        ("", "holds no settings"),
        ("just text", "holds no settings"),
        ("train: {lr: 1, lrr: 2}", "unknown setting 'train.lrr'"),
        ("budget:", "budget is None"),
    ],
)
def test_bad_files(tmp_path: Path, content: str, words: str):
    assert words in problem(file=write(tmp_path, content))
    assert "no such configuration file" in problem(file=str(tmp_path / "missing.yaml"))


IMAGE = {"image": "0.png", "question": "w1", "answer": "w2"}
TOLD = {"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]}
SHOWN = {"messages": [{"role": "user", "content": [{"type": "image", "image": "0.png"}]}, TOLD["messages"][1]]}


@pytest.mark.parametrize(
    ("name", "records", "family"),
    [
        ("words.txt", "w1 w2", "llm"),
        ("texts.jsonl", [{"text": "w1"}], "llm"),
        ("told.json", [TOLD], "llm"),
        ("asked.jsonl", [IMAGE], "vlm"),
        ("one-is-broken.jsonl", [{}, IMAGE], "vlm"),
        ("shown.jsonl", [SHOWN], "vlm"),
        ("questions.png", "", None),
    ],
)
def test_the_data_says_whether_a_model_reads_images(name: str, records: object, family: str | None, tmp_path: Path):
    """Of Qwen3.5 texts take the language model alone; a folder holds what its files hold."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3_5"}')
    file = tmp_path / "data" / name
    file.parent.mkdir()
    file.write_text(records if isinstance(records, str) else "\n".join(map(json.dumps, records)))
    named = {"model": str(tmp_path / "model"), "budget__target": 0.9}
    if family is None:
        with pytest.raises(ValueError, match="unknown kind of file"):
            make_config(data__source=str(file), **named)
        return
    for source in (file, file.parent):
        assert make_config(data__source=source, **named).family == family
    assert make_config(data__source="builtin", **named).family == "llm"
    assert (
        make_config(data__source="easy-vqa", **named).family == make_config(data__source="a/b", **named).family == "vlm"
    )
    assert make_config(data__source="a/b", settings=["family=llm"], **named).family == "llm"
    with pytest.raises(ValueError, match=r"needs questions about images: .*, or, for its language model alone, texts"):
        make_config(**named)
