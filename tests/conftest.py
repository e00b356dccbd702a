"""Fixtures of tiny models, their data and configurations, and of the operators' backends."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from students.kernels.cpu import toolchain
from tests.backends import BACKENDS, running_on
from tests.elastic.runs import Configure, configurations, distill
from tests.pico.language import RUN_SETTINGS, TINY, make_tiny, make_tokenizer

torch.set_num_threads(1)  # on tensors this small threads only wait for each other


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="K/N", help="run one of N parts of the tests, the Kth")


@pytest.hookimpl(trylast=True)  # after -m and -k have chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep a part of the tests, and skip what needs a GPU where there is none."""
    part, parts = map(int, config.getoption("part").split("/"))
    config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % parts != part - 1])
    items[:] = items[part - 1 :: parts]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_collection_finish() -> None:
    """Look for cycles among what tests make, seldom, and not among the modules of torch and transformers each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test touches the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTIC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with its tokenizer, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama").save_pretrained(folder)
    make_tokenizer(words=117).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of 4,000 words of that tokenizer, some frequent and many rare."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "words.txt"
    file.write_text(" ".join(f"w{min(116, int(draw.expovariate(1 / 30)))}" for _ in range(4000)))
    return file


@pytest.fixture(scope="session")
def configure(model_folder: Path, text_file: Path) -> Configure:
    """Configurations of tiny runs: (*settings "a.b=c", **flags of make_config)."""
    return configurations(RUN_SETTINGS, model=str(model_folder), data__source=str(text_file), budget__target=0.8)


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the configuration that `configure` makes with the settings RUN of the module, if any."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    distill(configure(*getattr(request.module, "RUN", ())), folder)
    return folder


@pytest.fixture(params=sorted(TINY))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """Each supported architecture in turn."""
    return make_tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny Llama."""
    return make_tiny("llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    """[2, 12] token ids."""
    return torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """For modules whose tests want none."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> object:
    """The C library, None where there is no compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "loaded", None)
        toolchain.build(tmp_path_factory.mktemp("library"))
        return toolchain.loaded


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Every backend that there is, one after the other: where tensors have to be for operators to run on it."""
    library = request.getfixturevalue("library") if request.param == "c" else None
    with running_on(request.param, library) as device:
        yield device


@pytest.fixture(params=["c", "reference"], scope="module")
def operators(request: pytest.FixtureRequest, library: object) -> Iterator[None]:
    """Those of them that run whole models on a CPU in no time."""
    with running_on(request.param, library):
        yield
