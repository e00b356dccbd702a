"""Command lines that do not parse, or do by a hair: one line says what is wrong, and what was meant."""

from __future__ import annotations

import pytest

from elastic import __version__
from elastic.cli import main
from elastic.cli.parser import parser


def test_misspelt_options(capsys: pytest.CaptureFixture[str]):
    for given, hint in (("--modle", " (did you mean --model?)"), ("--comput=1", ""), ("--ovrwrite", "--overwrite?)")):
        with pytest.raises(SystemExit, match="2"):
            main(["distill", given])
        message = capsys.readouterr().err
        assert message.startswith(f"elastic: error: unrecognized arguments: {given}")
        assert f"{hint} (see elastic distill --help)" in message and message.count("\n") == 1


def test_misspelt_commands_and_choices(capsys: pytest.CaptureFixture[str]):
    for given in ["--versoin"], ["--modle=x"]:
        with pytest.raises(SystemExit, match="2"):
            main(given)
        hint = " (did you mean --version?)" * (given == ["--versoin"])
        said = f"elastic: error: unrecognized arguments: {given[0]}{hint} (see elastic --help)\n"
        assert capsys.readouterr().err == said
    for given, hint in (["distil"], "distill"), (["eval", "run", "--baselines", "unifrom"], "uniform"), (["x"], None):
        with pytest.raises(SystemExit, match="2"):
            main(given)
        message = capsys.readouterr().err
        assert f"invalid choice: '{given[-1]}'" in message and message.count("\n") == 1
        assert ("did you mean" in message) == (hint is not None) and (hint is None or f"mean {hint}?" in message)


def test_empty_arguments(capsys: pytest.CaptureFixture[str]):
    for given, said in (
        *((command, "an argument is empty: name a folder") for command in (["eval", ""], ["compare", "run", ""])),
        (["report", "sweep", "", "-o", "x.html"], "an argument is empty: name a folder"),
        (["distill", "--model", "gpt2", "--output="], "--output is empty"),
        (["sweep", "--output", "s", "--target-compute", "0.7", "--model", "gpt2", ""], "--model is empty"),
        (["generate", "", "--prompt", ""], "an argument is empty"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(given)
        message = capsys.readouterr().err
        assert message.startswith(f"elastic: error: {said}") and message.count("\n") == 1


def test_values_that_are_named_twice_count_once():
    given = parser().parse_args(["eval", "run", "--compute", "0.7", "0.70", "0.8", "--baselines", "teal", "teal"])
    assert given.compute == [0.7, 0.8] and given.baselines == ["teal"]
    last = ["train.lr=1", "train.lr=2", "train.lr=1"]  # the last of two wins
    options = [word for setting in last for word in ("--set", setting)]
    assert parser().parse_args(["distill", *options]).set == last


def test_version(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"elastic {__version__}\n"


def test_a_sweep_takes_single_budgets(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="2"):
        main(["sweep", "--model", "gpt2", "--output", "new", "--target-compute", "0.5:1.0"])
    assert "'0.5:1.0'; write numbers, such as 0.5 0.7 1.0, which share a run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["distil"], ["eval"], ["eval", "run", "--nonsense"]),
        *(["distill", "--target-compute", target] for target in ("most", "0.5:")),
    ],
)
def test_command_lines_that_do_not_parse_get_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    out, err = capsys.readouterr()
    assert error.value.code == 2 and out == ""
    assert err.startswith("elastic: error: ") and err.count("\n") == 1
    command = arguments[0] + " " if len(arguments) > 1 or arguments == ["eval"] else ""
    assert f"(see elastic {command}--help)" in err
