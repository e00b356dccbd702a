"""Runs of local models and data can be used from any folder, and moved alone or with their model and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from elastic.cli import main
from elastic.run import Run
from teachers import hub
from tests.elastic.runs import as_options
from tests.pico.language import RUN_SETTINGS

SETTINGS = as_options(RUN_SETTINGS)


@pytest.fixture
def project(model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, a text and a run that was given both as relative paths; not the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(model_folder, folder / "my" / "model")
    shutil.copy(text_file, folder / "text.txt")
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("the hub was asked"))
    monkeypatch.chdir(folder)
    given = ["--model", "my/model", "--data", "text.txt", "--target-compute", "0.8", "--output", "runs/one"]
    assert main(["distill", *given, *SETTINGS]) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return folder


def works(run: Path) -> None:
    """Assert that a run generates, is evaluated, and can be resumed to the same routers."""
    before = (run / "routers.safetensors").read_bytes()
    assert main(["generate", str(run), "--prompt", "w3 w4", "--max-new-tokens", "2"]) == 0
    assert main(["eval", str(run)]) == 0
    (run / "routers.safetensors").unlink()
    assert main(["distill", "--resume", str(run)]) == 0
    assert (run / "routers.safetensors").read_bytes() == before


def as_of_an_earlier_version(run: Path) -> None:
    """Make a run's files like those of earlier versions: paths as typed, and no record of where they lay."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"], config["data"]["source"] = "my/model", "text.txt"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    about = json.loads((run / "elastic.json").read_text())
    about.pop("beside", None)
    (run / "elastic.json").write_text(json.dumps(about))


def test_a_run_is_moved_alone(project: Path, tmp_path: Path) -> None:
    works(Path(shutil.move(project / "runs" / "one", tmp_path / "moved")))


@pytest.mark.parametrize("old", [False, True])
def test_a_run_is_used_from_anywhere_and_moved_with_its_model_and_data(
    old: bool, project: Path, tmp_path: Path
) -> None:
    config = Run.open(project / "runs" / "one").config
    assert (config.model, config.data.source) == (str(project / "my" / "model"), str(project / "text.txt"))
    for place in (project, tmp_path / "a" / "b"):
        if place != project:
            shutil.move(project, place)
        if old:
            as_of_an_earlier_version(place / "runs" / "one")
        works(place / "runs" / "one")
    if not old:
        (tmp_path / "link").symlink_to(place / "runs" / "one")
        works(tmp_path / "link")


def test_a_sweep_goes_on_from_another_folder(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--target-compute", "0.8", "--no-bench", *SETTINGS]
    names = ["--model", str(project / "my" / "model"), "--data", str(project / "text.txt")]
    folder = str(project / "sweep")
    assert main(["sweep", *names, *given, "--output", folder]) in (0, 3)
    monkeypatch.chdir(project)
    assert main(["sweep", "--model", "my/model", "--data", "text.txt", *given, "--output", "sweep"]) in (0, 3)
    assert len((project / "sweep" / "results.jsonl").read_text().splitlines()) == 1


def test_a_model_that_is_gone_costs_one_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(project / "my")
    capsys.readouterr()
    for command in (["generate", "--prompt", "w3"], ["eval"]):
        assert main([*command, str(project / "runs" / "one")]) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert str(project / "my" / "model") in line and "is not there any more" in line and "config.yaml" in line
    for command in (["info"], ["distill", "--resume"]):  # the run is finished
        assert main([*command, str(project / "runs" / "one")]) == 0


def test_a_tilde_is_the_home_folder(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["generate", "~/project/runs/one", "--prompt", "w3", "--max-new-tokens", "2"]) == 0
    given = ["--model", "~/project/my/model", "--data", "~/project/text.txt", "--target-compute", "0.8"]
    assert main(["distill", *given, "--output", "~/two", *SETTINGS]) == 0
    works(tmp_path / "two")
    assert not Path("~").exists()
