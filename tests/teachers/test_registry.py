"""The table of models and what a typed name stands for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from teachers import hub, registry
from teachers.registry import models, resolve


def test_table_is_complete():
    for name, entry in models().items():
        assert entry.name == name
        assert entry.family in ("llm", "vit", "vlm") and entry.parameters and entry.license
        if entry.folder is None:
            assert entry.hub and entry.hub.count("/") == 1
        else:
            assert (entry.folder / "config.json").is_file() and entry.data != "builtin"
    assert [name for name, entry in models().items() if entry.wheel] == ["smollm2-135m"]


def test_short_name_hub_id_and_folder(tmp_path: Path):
    assert resolve("qwen2.5-0.5b").hub == "Qwen/Qwen2.5-0.5B"
    assert resolve("someone/some-model").hub == "someone/some-model"
    assert resolve("HuggingFaceTB/SmolLM2-135M-Instruct") is models()["smollm2-135m"]
    (tmp_path / "config.json").write_text("{}")
    assert resolve(str(tmp_path)).folder == tmp_path


def test_a_folder_with_the_name_of_a_short_name_is_not_passed_over_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    registry._say_which.cache_clear()
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text("{}")
    assert resolve("gpt2").hub == "openai-community/gpt2" and caplog.text == ""
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").hub == resolve("gpt2").hub == "openai-community/gpt2"
    said = "gpt2 is taken as the short name (`elastic models`); for the folder here type ./gpt2"
    assert [record.getMessage() for record in caplog.records] == [said]
    assert resolve("./gpt2").folder == Path("gpt2")


@pytest.mark.parametrize(
    ("typed", "near"),
    [("SmolLM2-135M-Instruct", "smollm2-135m"), ("llama3-8B", "llama3-8b"), ("qwen2.5", "qwen2.5-7b")],
)
def test_unknown_name_suggests_near_ones(typed: str, near: str):
    with pytest.raises(ValueError) as error:
        resolve(typed)
    assert near in str(error.value)
    assert "elastic models" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("typed", ["?", "completely-different"])
def test_what_is_neither_name_nor_folder_nor_hub_id(typed: str):
    with pytest.raises(ValueError, match="elastic models"):
        resolve(typed)


@pytest.mark.parametrize("typed", ["/no/such/folder", "./no/such", "../model", "my/own/model", "~/no-such-model"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(typed: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match=f"no such folder: {typed}; .*elastic models"):
        resolve(typed)


@pytest.mark.parametrize(("kind", "also"), [("qwen3_5", "llm"), ("qwen3_5_moe", "llm"), ("qwen3_vl", None)])
def test_a_language_model_that_can_be_loaded_alone(kind: str, also: str | None, tmp_path: Path):
    (tmp_path / "config.json").write_text(f'{{"model_type": "{kind}"}}')
    entry = resolve(str(tmp_path))
    assert (entry.family, entry.also) == ("vlm", also)


def test_folder_without_a_model(tmp_path: Path):
    with pytest.raises(ValueError, match=r"without config\.json"):
        resolve(str(tmp_path))


def test_table_needs_neither_torch_nor_transformers():
    code = "import sys, teachers; teachers.models(); assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
