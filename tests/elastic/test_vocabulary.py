"""Tokens and positions beyond a model's embeddings, and lengths beyond what positions or memory hold, are refused with
one line before anything is written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from elastic import bench, generate, trainer
from elastic.bench import bench_run
from elastic.cli import main
from elastic.evaluate import measure_run
from elastic.generate import generate_text
from students import RouterSpec, StudentSpec, elasticize
from teachers.families.language import most_positions, most_tokens
from tests.elastic.runs import Configure, silent
from tests.pico.language import TINY, make_tiny, make_tokenizer


@pytest.fixture(scope="module")
def short(configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of a tiny GPT-2, which has 64 learned position embeddings."""
    folder = tmp_path_factory.mktemp("gpt2")
    make_tiny("gpt2").save_pretrained(folder / "model")
    make_tokenizer(words=117).save_pretrained(folder / "model")
    trainer.distill(configure(model=str(folder / "model")), folder / "run", say=silent)
    return folder / "run"


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    """The folder of a model whose tokenizer has one token more than its embedding has rows."""
    folder = tmp_path / "grown"
    make_tiny("llama").save_pretrained(folder)
    tokenizer = make_tokenizer(words=117)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_a_row(grown: Path, configure: Configure, text_file: Path, tmp_path: Path) -> None:
    words = text_file.read_text()
    (tmp_path / "new.txt").write_text(f"w3 <|im_end|> {words}")
    config = configure(model=str(grown), data__source=str(tmp_path / "new.txt"))
    with pytest.raises(ValueError, match=r"more tokens than the model: '<\|im_end\|>' is number 120, .* 120 rows"):
        trainer.distill(config, tmp_path / "run", say=silent)
    assert not (tmp_path / "run").exists()
    # the token does no harm as long as no text contains it
    trainer.distill(configure(model=str(grown)), tmp_path / "run", say=silent)
    with pytest.raises(ValueError, match="more tokens than the model"):
        measure_run(str(tmp_path / "run"), data=str(tmp_path / "new.txt"), say=silent)
    with pytest.raises(ValueError, match="more tokens than the model"):
        generate_text(str(tmp_path / "run"), "w3 <|im_end|>")


def test_a_prompt_that_is_longer_than_the_positions(
    short: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, words in ((short, 64), (short, 80), (finished, 64)):  # learned embeddings of positions, and rotary ones
        with pytest.raises(ValueError, match=f"--prompt has {words} tokens, but the model reads at most 64"):
            generate_text(str(run), "w3 " * words)
    made = generate_text(str(short), "w3 " * 60, max_new_tokens=20)
    assert made["tokens"] <= 4 and made["full"] == (made["tokens"] == 4)
    assert not generate_text(str(short), "w3", max_new_tokens=2)["full"]
    assert main(["generate", str(short), "--prompt", "w3 " * 60]) == 0
    assert ("stopped: the model has no position" in capsys.readouterr().err) == made["full"]


def test_timing_stays_within_the_positions(short: Path, finished: Path) -> None:
    """Lengths that nobody asks for end where positions do, of a tiny GPT-2 and a tiny Llama; those asked for are
    refused, or computed where a model can."""
    rows = bench_run(str(short), tokens=[64], new_tokens=8, repeats=1, say=silent)
    assert [row["phase"] for row in rows] == ["prefill", "decode", "train"]
    with pytest.raises(ValueError, match="reads at most 64 tokens at once: say --tokens 64 --new-tokens 32"):
        bench_run(str(short), new_tokens=64, repeats=1, say=silent)
    for run in short, finished:
        said: list[str] = []
        rows = bench_run(str(run), repeats=1, say=said.append)
        assert [row["tokens"] for row in rows[:2]] == [64, 32] and "decoding 1 x 32 tokens after 28 ..." in said
        assert said[0] == "timed within the model's positions: prompts of 64, 32 new tokens"
    rows = bench_run(str(finished), tokens=[80], new_tokens=2, repeats=1, say=silent)
    assert [row["tokens"] for row in rows[:2]] == [80, 2]


def test_more_new_tokens_than_there_are_positions_or_room_for(
    finished: Path, short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny Llama has 64 positions, where its text ends; to ask for more than there are at all is a mistake."""
    assert generate_text(str(finished), "w3 w4", max_new_tokens=64)["tokens"] <= 62
    with pytest.raises(ValueError, match=r"is 100000000, but .* positions for 64 tokens.*: say --max-new-tokens 62"):
        generate_text(str(finished), "w3 w4", max_new_tokens=100_000_000)
    assert generate_text(str(short), "w3 w4", max_new_tokens=100_000_000)["tokens"] <= 62  # ends where positions do
    monkeypatch.setattr(generate, "free_memory", lambda device: 384 * 10)  # a token's keys and values take 384 bytes
    assert generate_text(str(finished), "w3 w4", max_new_tokens=8)["tokens"] <= 8
    with pytest.raises(ValueError, match=r"is 40, whose keys and values take 0\.0 GB.*: say --max-new-tokens 4"):
        generate_text(str(finished), "w3 w4", max_new_tokens=40)


def test_timing_that_no_memory_holds(finished: Path, short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: [])
    for asked, said in (
        (dict(tokens=[8, 10**14]), "1 x 100000000000000 tokens .* at least .* GB are free: say --tokens [0-9]+$"),
        (dict(new_tokens=10**14), "say --new-tokens [0-9]+$"),
        (dict(batch=[1, 10**12], tokens=[8]), "1000000000000 x 60 tokens .* say --batch [0-9]+$"),
        (dict(batch=[10**12], tokens=[10**14]), "say --batch 1 --tokens [0-9]+$"),
    ):
        with pytest.raises(ValueError, match=said):
            bench_run(str(finished), say=silent, **{"new_tokens": 8, **asked})
    assert bench_run(str(finished), batch=[8], tokens=[128], say=silent) == []
    with pytest.raises(ValueError, match=r"compute 5\.0 is outside what this student can be set to"):
        bench_run(str(finished), compute=[0.8, 5.0], tokens=[8], say=silent)
    with pytest.raises(ValueError, match="reads at most 64 tokens"):
        bench_run(str(short), tokens=[10**14], say=silent)


@pytest.mark.parametrize(
    ("rope", "most"),
    [
        (dict(rope_type="default"), 64),
        (dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64), 256),
        ({"full_attention": dict(rope_type="linear", factor=8.0), "sliding_attention": {}}, 512),
    ],
)
def test_positions_that_a_config_stretches(rope: dict, most: int) -> None:
    trunk = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=64, rope_parameters=rope))
    assert most_positions(trunk) == most
    del trunk.config.max_position_embeddings
    assert most_positions(trunk) is None


def test_random_tokens_stay_within_the_positions(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(short.parent / "model")
    assert main(["bench", "--model", model, "--random-weights", "--target-compute", "0.8"]) == 2
    assert "reads at most 64 tokens: say --set data.window=64" in capsys.readouterr().err


@pytest.mark.parametrize("name", TINY)
def test_which_models_have_a_limit(name: str) -> None:
    student = elasticize(make_tiny(name), StudentSpec((RouterSpec("token"),)))
    assert most_tokens(student.trunk) == (64 if name == "gpt2" else None)
    with torch.no_grad():
        if name != "gpt2":
            student(torch.full((1, 70), 5))
