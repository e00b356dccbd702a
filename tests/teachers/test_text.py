"""Text data: packing loses no token, held-out text stays out of training, and bad sources cost one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from teachers import hub
from teachers.data import text
from teachers.data.left_out import LeftOut
from teachers.data.text import load_text, load_windows
from tests.pico.language import make_tokenizer

EOS, BOS = 1, 2  # ids in tests.pico.language.make_tokenizer


def words(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_windows_are_the_whole_text_in_order(tmp_path: Path):
    file = tmp_path / "a.txt"
    file.write_text("\n\n".join(words(i, i + 10) for i in range(0, 1000, 10)))
    windows = load_windows(str(file), make_tokenizer(), window=16)
    assert windows.dtype == torch.int64
    assert windows.flatten().tolist() == list(range(3, 3 + 1000 // 16 * 16))


def test_long_texts_are_tokenized_in_pieces_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text, "_PIECE_CHARS", 100)
    file = tmp_path / "a.md"
    file.write_text("\n".join(words(i, i + 5) for i in range(0, 1000, 5)))
    assert load_windows(str(file), make_tokenizer(), window=10).flatten().tolist() == list(range(3, 1003))
    for content in ("x" * 1000, "\n" * 1000, "a\n" * 333, ""):
        assert "".join(text._pieces(content)) == content


def test_documents_are_joined_with_eos(tmp_path: Path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": words(i, i + 7)} for i in range(0, 70, 7)])
    stream = load_windows(source, make_tokenizer(), window=79).flatten().tolist()  # 70 words and 9 separators
    assert [i for i, token in enumerate(stream) if token == EOS] == list(range(7, 79, 8))
    assert [token for token in stream if token != EOS] == list(range(3, 73))


def test_windows_start_with_bos_where_the_tokenizer_adds_it(tmp_path: Path):
    (tmp_path / "a.txt").write_text(words(0, 100))
    windows = load_windows(str(tmp_path / "a.txt"), make_tokenizer(bos=True), window=11)
    assert windows.shape == (10, 11) and (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().tolist() == list(range(3, 103))


@pytest.mark.parametrize("documents", [1, 7, 200])
@pytest.mark.parametrize("held_out", [3, 25])
def test_held_out_is_disjoint_complete_and_repeatable(tmp_path: Path, documents: int, held_out: int):
    size = 2000 // documents
    records = [{"text": words(i * size, (i + 1) * size)} for i in range(documents)]
    source = write_jsonl(tmp_path / "a.jsonl", records + records[:1])  # a repeated text must not be in both parts
    options = dict(window=8, held_out=held_out, seed=1)
    data = load_text(source, make_tokenizer(), **options)
    train, aside = (set(part.flatten().tolist()) - {EOS} for part in (data.train, data.held_out))
    assert not train & aside
    assert len(data.held_out) == held_out
    assert data.tokens == size * documents and str(data.tokens) in data.description.replace(",", "")
    assert len(train | aside) > 0.97 * data.tokens  # all but both streams' ends and the last set-aside text's
    again = load_text(source, make_tokenizer(), **options)
    assert torch.equal(data.train, again.train) and torch.equal(data.held_out, again.held_out)
    if documents == 1:
        assert min(aside) > max(train)
    else:
        assert not torch.equal(data.held_out, load_text(source, make_tokenizer(), **{**options, "seed": 5}).held_out)


NAMES = {
    "train.txt": "val.txt",
    "a.md": "my-dev2.md",
    "train/test.txt": "valid/a.txt",
    "interval.txt": "sub/Test/train-a.txt",
    "data/train-0.txt": "data/validation-0.txt",
}


@pytest.mark.parametrize("trained_on", NAMES)
def test_a_part_is_held_out_by_its_name(tmp_path: Path, trained_on: str):
    held_out = NAMES[trained_on]
    for name, first in ((trained_on, 0), (held_out, 500)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(words(first, first + 100))
    (tmp_path / "again.txt").write_text(words(500, 600))  # a text that occurs in both parts is held out
    options = dict(window=10, held_out=3, seed=0)
    data = load_text(str(tmp_path), make_tokenizer(), **options)
    assert data.train.flatten().tolist() == list(range(3, 103))
    assert data.held_out.flatten().tolist() == list(range(573, 603))
    assert data.held_out_from == str(tmp_path / held_out) and data.tokens == 200
    assert len(load_text(str(tmp_path), make_tokenizer(), **{**options, "held_out": 99}).held_out) == 10
    assert load_windows(str(tmp_path), make_tokenizer(), window=10).flatten().tolist() == list(range(503, 603))
    assert len(load_text(str(tmp_path / held_out), make_tokenizer(), **options).train) == 7  # named itself
    with pytest.raises(ValueError, match=r"100 tokens found in its held-out part \(.*, 200 needed for one window"):
        load_text(str(tmp_path), make_tokenizer(), **{**options, "window": 200})
    for name in (trained_on, "again.txt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match="no text to train on, only a held-out part"):
        load_text(str(tmp_path), make_tokenizer(), **options)


def test_a_hub_data_set_has_splits(monkeypatch: pytest.MonkeyPatch):
    import datasets

    rows = {"test": words(0, 9), "validation": words(9, 39), "train": words(39, 99)}
    monkeypatch.setattr(text.hub, "unreachable", lambda: None)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: list(rows))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, split, streaming: [{"text": rows[split]}])
    data = load_text("org/data", make_tokenizer(), window=10, held_out=2, seed=0)
    assert data.train.flatten().tolist() == list(range(42, 102)) and data.held_out_from == "the split validation"
    assert load_windows("org/data", make_tokenizer(), window=10).flatten().tolist() == list(range(12, 42))


def test_max_tokens_limits_the_reading(tmp_path: Path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": words(i, i + 10)} for i in range(0, 1000, 10)])
    data = load_text(source, make_tokenizer(), window=8, held_out=2, seed=0, max_tokens=105)
    assert data.tokens == 105
    assert int(max(data.train.max(), data.held_out.max())) <= 105 + 2


def test_messages_use_the_chat_template(tmp_path: Path):
    messages = [{"role": "user", "content": "w0 w1"}, {"role": "assistant", "content": "w2"}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages, "id": "x"}])
    template = "{% for m in messages %}{{ 'w10 ' + m.content + ' w11 ' }}{% endfor %}"
    assert load_windows(source, make_tokenizer(template=template), window=7).tolist() == [[13, 3, 4, 14, 13, 5, 14]]
    plain = load_windows(source, make_tokenizer(), window=5)[0].tolist()
    assert plain == [0, 3, 4, 0, 5]  # "user:" and "assistant:" are unknown words here


@pytest.mark.parametrize("pair", text.PAIRS)
def test_pairs_make_one_document(tmp_path: Path, pair: tuple[str, str]):
    source = write_jsonl(tmp_path / "a.jsonl", [{pair[0]: "w0 w1", pair[1]: "w2", "other": 1}])
    assert load_windows(source, make_tokenizer(), window=3).tolist() == [[3, 4, 5]]


def documents(source: str | Path, tokenizer: object = None, **options: object) -> list[str]:
    """Return the texts that are read from a source."""
    part, _ = text._parts(str(source))
    found = LeftOut(str(source))
    return list(text._texts(str(source), part, tokenizer or make_tokenizer(), found, streaming=False))


def test_alpacas_input_belongs_to_the_instruction(tmp_path: Path):
    rows = [{"instruction": "w0", "input": "w1", "output": "w2"}, {"instruction": "w3", "input": "", "output": "w4"}]
    assert documents(write_jsonl(tmp_path / "a.jsonl", rows)) == ["w0\nw1\nw2", "w3\nw4"]


def test_answers_may_be_numbers_truth_values_and_empty(tmp_path: Path):
    answers = [3, 0, 2.5, True, False, "", "w1"]
    source = write_jsonl(tmp_path / "a.jsonl", [{"question": "w0", "answer": answer} for answer in answers])
    told = ["3", "0", "2.5", "true", "false", "", "w1"]
    assert documents(source) == [f"w0\n{answer}" for answer in told]


ODD = {
    "no JSON": '{"messages": ',
    "no object": '["w1"]',
    "no record": '"w1"',
    "no UTF-8": b'{"messages": [{"role": "user", "content": "caf\xe9"}]}',
    "no Unicode": '{"messages": [{"role": "user", "content": "\\ud800"}]}',
    "null": '{"messages": [{"role": "user", "content": "w1"}, {"role": "assistant", "content": null}]}',
    "a number": '{"text": 5}',
    "a truth value": '{"text": true}',
    "no number": '{"question": "w1", "answer": NaN}',
    "no turns": '{"messages": []}',
    "one text": '{"messages": "w1"}',
    "no roles": '{"messages": ["w1", "w2"]}',
    "no content": '{"messages": [{"role": "user"}]}',
    "nothing": '{"messages": null}',
    "an image": '{"messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w1"}]}]}',
    "refused": '{"messages": [{"role": "judge", "content": "w1"}]}',
    "other fields": '{"body": "w1"}',
}


@pytest.mark.parametrize("odd", ODD)
def test_one_odd_record_is_left_out_and_named(odd: str, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    file = tmp_path / "a.jsonl"
    good = [{"messages": [{"role": "user", "content": words(i, i + 10)}]} for i in range(0, 400, 10)]
    lines = [json.dumps(record).encode() for record in good]
    line = ODD[odd]
    file.write_bytes(b"\n".join([*lines[:20], b"", line if isinstance(line, bytes) else line.encode(), *lines[20:]]))
    template = (
        "{% for m in messages %}{% if m.role == 'judge' %}{{ raise_exception('no judges') }}{% endif %}"
        "{{ m.content }} {% endfor %}"
    )
    tokenizer = make_tokenizer(template=template)
    data = load_text(str(file), tokenizer, window=8, held_out=2, seed=0)
    assert data.tokens == 400
    assert [(len(part), list(part.reasons)) for part in data.left_out] == [(1, [f"{file}, line 22"])]
    load_windows(str(file), tokenizer, window=8)
    assert caplog.text.count(f"left out: {file}, line 22: ") == 2  # once in each reading
    assert f"1 of 41 records of {file} are left out" in caplog.text


def test_a_source_of_mostly_odd_records_is_refused(tmp_path: Path):
    rows = [{"text": "w1 w2 w3"}] * 4 + [{"text": None}] * 4
    assert len(load_windows(write_jsonl(tmp_path / "half.jsonl", rows), make_tokenizer(), window=2)) == 7
    source = write_jsonl(tmp_path / "more.jsonl", [*rows, {"text": [1]}])
    with pytest.raises(ValueError, match=r"5 of 9 records of .* such as .*more.jsonl, line 5: .* text \(null\)"):
        load_windows(source, make_tokenizer(), window=2)


@pytest.mark.parametrize(
    "turns",
    [
        [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}],
        [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2", "tool_calls": None}],
        [{"role": "system", "content": None}, {"role": "human", "content": "w1"}, {"role": "bot", "content": "w2"}],
        [{"role": "user", "content": [{"type": "text", "text": "w1"}]}, {"role": "model", "content": ["w2"]}],
        '[{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]',
        {"role": ["user", "assistant"], "content": ["w1", "w2"]},
        {"role": ["user", "assistant"], "content": ["w1", "w2"], "name": None},
    ],
)
def test_conversations_of_any_form_are_the_same_text(turns: list | dict | str, tmp_path: Path):
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    template = "{% for m in messages %}{{ m.keys() | list | length }} {{ m.role }} {{ m.content }};{% endfor %}"
    assert documents(source) == ["user: w1\nassistant: w2"]
    assert documents(source, make_tokenizer(template=template)) == ["2 user w1;2 assistant w2;"]


def test_parquet_with_messages_as_a_struct_of_lists(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"role": ["user", "assistant"], "content": [f"w{i}", "w2"]} for i in range(3)]
    rows.append({"role": ["user"], "content": ["w1", "w2"]})
    pyarrow.parquet.write_table(pyarrow.table({"messages": rows}), tmp_path / "a.parquet")
    found = LeftOut("")
    texts = text._texts("", [tmp_path / "a.parquet"], make_tokenizer(), found, streaming=False)
    assert list(texts) == [f"user: w{i}\nassistant: w2" for i in range(3)]
    assert found.reasons == {f"{tmp_path / 'a.parquet'}, row 4": "the lists of role, content differ in length"}


def test_a_call_of_a_tool_is_the_templates_matter(tmp_path: Path):
    turns = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": None, "tool_calls": [{"name": "w3"}]}]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ c.name }}{% endfor %};{% endfor %}"
    assert documents(source, make_tokenizer(template=template)) == ["w1;w3;"]
    assert documents(source) == []


def test_a_chat_templates_own_bos_and_eos_are_not_doubled(tmp_path: Path):
    messages = [[{"role": "user", "content": words(i, i + 3)}] for i in range(0, 30, 3)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns} for turns in messages])
    template = "{{ bos_token }} {% for m in messages %}{{ m.content }}{% endfor %} {{ eos_token }}"
    ids = load_windows(source, make_tokenizer(bos=True, template=template), window=8)
    plain = write_jsonl(tmp_path / "b.jsonl", [{"text": turns[0]["content"]} for turns in messages])
    assert torch.equal(ids, load_windows(plain, make_tokenizer(bos=True), window=8))
    assert (ids == BOS).sum() == len(ids) and not ((ids[:, 1:] == EOS) & (ids[:, :-1] == EOS)).any()
    without = load_windows(source, make_tokenizer(template=template), window=4)  # adds no BOS to windows
    assert (without == BOS).sum() == len(messages)


def test_what_is_hidden_is_no_data(tmp_path: Path):
    (tmp_path / "a.txt").write_text("w1")
    for name in (".ipynb_checkpoints/a-checkpoint.txt", "__MACOSX/._a.txt", "sub/.b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("w2")
    assert documents(tmp_path) == ["w1"]


def test_a_text_file_of_another_encoding_is_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.txt").write_text("w1")
    (tmp_path / "c.txt").write_text("w2", encoding="utf-8-sig")
    assert documents(tmp_path) == ["w1", "w2"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a.txt", "w1"),
        ("a.jsonl", '{"text": "w1"}\r\n\r\n'),
        ("a.json", '{"text": "w1"}'),
        ("b.json", '[{"text": "w1"}]'),
    ],
)
def test_files_as_windows_writes_them(encoding: str, name: str, written: str, tmp_path: Path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / name).write_bytes((mark + written).encode(encoding))
    assert documents(tmp_path) == ["w1"]


def test_a_list_of_records_and_a_lone_one(tmp_path: Path):
    (tmp_path / "a.json").write_text(json.dumps([{"text": "w1"}, 3, {"text": "w2"}], indent=2))
    (tmp_path / "b.json").write_text(json.dumps({"text": "w3"}, indent=2))
    (tmp_path / "c.json").write_text('{"text": "w4"}\n{"text": "w5"}\n')
    (tmp_path / "d.jsonl").write_text('[{"text": "w6"}]')
    assert documents(tmp_path) == ["w1", "w2", "w3", "w4", "w5", "w6"]
    (tmp_path / "torn.json").write_text('[{"text": "w1"}, {"text')
    with pytest.raises(ValueError, match=r"torn\.json cannot be read: "):
        documents(tmp_path / "torn.json")


def test_folder_of_several_kinds(tmp_path: Path):
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "data [1]*"  # characters with a meaning in glob patterns
    (folder / "sub").mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.table({"text": [words(0, 10)]}), folder / "a.parquet")
    (folder / "sub" / "b.txt").write_text(words(10, 20))
    (folder / "c.json").write_text(json.dumps([{"text": words(20, 30)}]))
    (folder / "ignored.csv").write_text("x")
    ids = load_windows(str(folder), make_tokenizer(), window=32).flatten().tolist()
    assert sorted(set(ids) - {EOS}) == list(range(3, 33)) and ids.count(EOS) == 2


def test_bad_sources_get_one_line(tmp_path: Path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text(words(0, 20))
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": ')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "data.csv").write_text("text\nx")
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "columns.jsonl", [{"label": 1, "body": "w1"}])
    write_jsonl(tmp_path / "objects.jsonl", [{"question": "w1", "answer": {"a": 3}}])
    write_jsonl(tmp_path / "roles.jsonl", [{"messages": [{"who": "user", "said": "w1"}]}])
    cases = {
        "empty.txt": "0 tokens found, 24 needed",
        "short.txt": "20 tokens found, 24 needed",
        "broken.jsonl": "cannot be read",
        "latin.txt": "cannot be read",
        "data.csv": "unknown kind of file",
        "folder": "no .txt, .md",
        "columns.jsonl": "label, body; one of these is needed: text, messages, prompt",
        "objects.jsonl": "objects.jsonl, line 1: its answer is no text but",
        "roles.jsonl": "no conversation",
        "missing.txt": "no such file or folder",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError) as error:
            load_text(str(tmp_path / name), make_tokenizer(), window=8, held_out=2, seed=0)
        assert message in str(error.value) and name in str(error.value)
        assert "\n" not in str(error.value)
    for source in ("missing", "missing/data/set", "./a/b", "a/b.txt"):
        with pytest.raises(ValueError, match=r"no such file or folder: .*--data takes"):
            load_windows(source, make_tokenizer(), window=8)


def test_a_hub_data_set_without_a_hub(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "unreachable", lambda: "no network here")
    with pytest.raises(ValueError, match=r"^no such file or folder: org/data:config; .*no network here") as error:
        load_windows("org/data:config", make_tokenizer(), window=8)
    assert "\n" not in str(error.value)
