"""Questions about images: the speaker tells questions from answers, and odd records are left out, not errors."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from teachers.data.conversations import Turn, questions_and_answers, turns_of
from teachers.data.prompts import call
from teachers.data.questions import QuestionSet, load_all, load_questions
from tests.pico.processors import make_processor

ASKED = {"from": "human", "value": "<image>\nwhat is it?"}
SAID = {"from": "gpt", "value": "a thing"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of twelve images, named by number."""
    for number in range(12):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def write(folder: Path, rows: list[Any], name: str = "train.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def pairs(asked: QuestionSet) -> list[tuple[str, str]]:
    return [(sample.question, sample.answer) for sample in asked.samples]


@pytest.mark.parametrize(
    "turns",
    [
        [ASKED, SAID],
        [{"from": "system", "value": "Be brief."}, ASKED, SAID],
        [{"from": "gpt", "value": "Hello!"}, ASKED, SAID],
        [{"from": "system", "value": None}, {"from": "gpt", "value": "Hello!"}, ASKED, SAID],
        [ASKED, SAID, {"from": "human", "value": "and now?"}],
        [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a thing"}],
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "a thing"}]},
        ],
        {"role": ["user", "assistant"], "content": ["what is it?", "a thing"]},
        {"from": ["human", "gpt"], "value": [ASKED["value"], "a thing"]},
    ],
)
@pytest.mark.parametrize("name", ["conversations", "messages"])
def test_roles_say_what_is_asked_and_what_answered(turns: Any, name: str, folder: Path) -> None:
    asked = load_all(write(folder, [{"image": "0.png", name: turns}]))
    assert pairs(asked) == [("what is it?", "a thing")]


def test_turns_of_one_side_in_a_row_are_one() -> None:
    sides = {"u": "user", "a": "assistant", "s": "system"}
    turns = [Turn(sides[side], f"{side}{n}") for n, side in enumerate("asuuasaua")]
    assert questions_and_answers(turns) == [("u2\nu3", "a4\na6"), ("u7", "a8")]
    for none in ("u", "a", "as", "sa"):
        with pytest.raises(ValueError, match="no turn of the user is followed by one of the assistant"):
            questions_and_answers([Turn(sides[side], "") for side in none])
    with pytest.raises(ValueError, match="a turn of 'tool' is neither"):
        questions_and_answers([Turn("user", "u"), Turn("tool", "t"), Turn("assistant", "a")])


def test_every_answer_of_a_conversation_is_for_its_own_question(folder: Path) -> None:
    turns = [ASKED, SAID, {"from": "human", "value": "where?"}, {"from": "gpt", "value": "here"}]
    assert pairs(load_all(write(folder, [{"image": "0.png", "conversations": turns}]))) == [
        ("what is it?", "a thing"),
        ("where?", "here"),
    ]


def test_labels_that_a_processor_makes_are_no_inputs() -> None:
    made = call(make_processor("paligemma"), ["<image>w1 w2\n"], [Image.new("RGB", (16, 16))], "left")
    assert {"input_ids", "pixel_values", "token_type_ids"} <= made.keys() and "labels" not in made


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        *((3, "3"), (0, "0"), (1.5, "1.5"), (True, "true"), (False, "false"), ("", "")),
        *((["no", "yes", "yes"], "yes"), ([0, 0, 1], "0"), ({"answer": ["a", "b", "b"]}, "b")),
        ([{"answer": "a"}, {"answer": "b"}, {"answer": "b"}], "b"),
    ],
)
def test_answers_may_be_numbers_truth_values_and_empty(answer: Any, text: str, folder: Path) -> None:
    key = "answers" if isinstance(answer, list | dict) else "answer"
    rows = [{"image": "0.png", "question": "q", key: answer}, {"image": "1.png", "question": "q", "answer": "other"}]
    assert pairs(load_all(write(folder, rows))) == [("q", text), ("q", "other")]
    turns = [ASKED, {"from": "gpt", "value": answer}]
    if key == "answer":
        found = load_all(write(folder, [{"image": "0.png", "conversations": turns}]))
        assert pairs(found) == [("what is it?", text)]


ODD = {
    "text only": {"conversations": [ASKED, SAID]},
    "text only, null": {"image": None, "conversations": [ASKED, SAID]},
    "no path": {"image": "", "question": "q", "answer": "a"},
    "an address": {"image": "https://example.org/0.png", "question": "q", "answer": "a"},
    "no base64": {"image": "data:image/png;base64,?", "question": "q", "answer": "a"},
    "two images": {"image": ["0.png", "1.png"], "conversations": [ASKED, SAID]},
    "null answer": {"image": "0.png", "question": "q", "answer": None},
    "null question": {"image": "0.png", "question": None, "answer": "a"},
    "no answers": {"image": "0.png", "question": "q", "answers": []},
    "null turn": {"image": "0.png", "conversations": [ASKED, {"from": "gpt", "value": None}]},
    "no roles": {"image": "0.png", "conversations": ["what is it?", "a thing"]},
    "nobody answers": {"image": "0.png", "conversations": [ASKED]},
    "no record": ["0.png", "q", "a"],
}


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_record_is_left_out_and_named(odd: str, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[Any] = [{"image": f"{n}.png", "conversations": [ASKED, {"from": "gpt", "value": n}]} for n in range(12)]
    source = write(folder, [*rows[:5], ODD[odd], *rows[5:]])
    data = load_questions(source, held_out=2, seed=0)
    assert sorted(answer for part in (data.train, data.held_out) for _, answer in pairs(part)) == sorted(
        str(n) for n in range(12)
    )
    assert list(data.train.records.reasons) == [f"{source}, line 6"]
    assert caplog.text.count(f"left out: {source}, line 6: ") == 1
    assert f"1 of 13 records of {source} are left out" in caplog.text


def test_mostly_odd_records_are_refused(folder: Path) -> None:
    good = {"image": "0.png", "question": "q", "answer": "a"}
    assert len(load_all(write(folder, [good, {"text": "t"}]))) == 1
    with pytest.raises(
        ValueError, match=r"2 of 3 records of .* such as .*train.jsonl, line 2: it has no image, but .*text"
    ):
        load_all(write(folder, [good, {"text": "t"}, {"text": "t"}]))


def test_an_image_in_a_list_or_in_a_turn_is_read(folder: Path) -> None:
    rows: list[Any] = [{"images": ["3.png"], "question": "q", "answer": "a"}]
    inside = "data:image/png;base64," + base64.b64encode((folder / "3.png").read_bytes()).decode()
    urls = ["3.png", inside, f"file://{folder / '3.png'}"]
    for part in ({"type": "image", "image": "3.png"}, *({"type": "image_url", "image_url": {"url": u}} for u in urls)):
        asked = {"role": "user", "content": [part, {"type": "text", "text": "q"}]}
        rows.append({"messages": [asked, {"role": "assistant", "content": "a"}]})
    found = load_all(write(folder, rows)).read(range(5))
    assert [(image.getpixel((0, 0)), question, answer) for image, question, answer in found] == [
        ((3, 0, 0), "q", "a")
    ] * 5


def test_broken_images_are_left_out_and_others_stand_in(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "1.png").write_bytes(b"")
    (folder / "2.png").unlink()
    rows = [{"image": f"{n}.png", "question": f"q{i}", "answer": str(n)} for n in range(6) for i in range(2)]
    data = load_questions(write(folder, rows), held_out=2, seed=1)
    assert len(data.train.left_out) == 4
    named = [message for message in caplog.messages if message.startswith("left out")]
    assert named == [
        f"left out: {folder / '1.png'}: no image, or of a kind that cannot be read",
        f"left out: {folder / '2.png'}: no such file",
    ]
    whole = load_all(str(folder / "train.jsonl"))
    assert [answer for _, _, answer in whole.read(range(12))] == ["0", "0", *(str(n) for n in (3, 3, 4, 4, 5, 5))]
    assert [number for number, _ in whole.filled([1, 2, 3])] == [1, 6, 7]
    with pytest.raises(ValueError, match="none of 2 questions can be read"):
        whole.subset([2, 3]).filled([0])


def test_a_file_may_be_named_from_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(folder, [{"image": "0.png", "question": "what is it?", "answer": "a thing"}])
    monkeypatch.chdir(folder.parent)
    (read,) = load_all(f"{folder.name}/train.jsonl").read([0])
    assert read[1:] == ("what is it?", "a thing")


def test_photos_are_upright_and_paths_are_the_folders_own(folder: Path) -> None:
    image = Image.new("RGB", (10, 6))
    exif = image.getexif()
    exif[274] = 6
    (folder / "sub").mkdir()
    image.save(folder / "sub" / "photo.jpg", exif=exif)
    rows = [{"image": "sub/photo.jpg", "question": "q", "answer": "a"}]
    assert load_all(write(folder, rows)).read([0])[0][0].size == (6, 10)


def test_parquet_with_bytes_and_turns_in_lists(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    def encoded(number: int) -> bytes:
        file = io.BytesIO()
        Image.new("L", (4, 4), number).save(file, "PNG")
        return file.getvalue()

    turns = [{"from": ["human", "gpt"], "value": ["<image>", str(n)]} for n in range(4)]
    images = [{"bytes": encoded(n) if n else None, "path": None} for n in range(4)]
    pyarrow.parquet.write_table(pyarrow.table({"image": images, "conversations": turns}), folder / "train.parquet")
    asked = load_all(str(folder / "train.parquet"))
    assert [(image.getpixel((0, 0))[0], answer) for image, _, answer in asked.read(range(4))] == [
        (1, "1"),
        (2, "2"),
        (3, "3"),
    ]
    assert list(asked.left_out.reasons) == [f"{folder / 'train.parquet'}, row 1"]


def test_files_of_a_folder_are_told_apart_by_whole_words(folder: Path) -> None:
    for name in ("latest.jsonl", "interval.jsonl", "x-train.jsonl", "x_VAL.jsonl", "._x_val.jsonl"):
        number = len(name) % 12
        write(folder, [{"image": f"{number}.png", "question": name, "answer": "a"}], name)
    data = load_questions(str(folder), held_out=1, seed=0)
    assert [question for question, _ in pairs(data.held_out)] == ["x_VAL.jsonl"]
    assert len(data.train) == 3


def test_turns_keep_what_else_they_say() -> None:
    (turn,) = turns_of([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}])
    assert turn == Turn("assistant", "", (), {"tool_calls": [{"name": "f"}]})
