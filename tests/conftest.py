"""Fixtures shared by all tests: tiny models, their data and run configurations, and the operators' backends."""

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--part", default="1/1", metavar="K/N", help="run one of N parts of the tests, the Kth")


@pytest.hookimpl(trylast=True)  # so that parts are taken of the tests that -m and -k select
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of part K of N (option --part), and skip tests marked gpu on a machine without a GPU."""
    part, parts = map(int, config.getoption("part").split("/"))
    config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % parts != part - 1])
    items[:] = items[part - 1 :: parts]
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_collection_finish() -> None:
    """Make garbage collection cheap: exempt all objects made so far (torch, transformers), and collect less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Give fixtures the same random numbers whatever ran before."""
    torch.manual_seed(0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call() -> None:
    """Give a test the same random numbers whether it is the first to need a shared fixture or not."""
    torch.manual_seed(1)


@pytest.fixture(autouse=True)
def wide_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print tables as wide as they are, so that how long the paths of temporary folders are breaks no line."""
    monkeypatch.setenv("COLUMNS", "1000")


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Set ELASTIC_CACHE to a temporary folder, so that no test touches the user's own cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELASTIC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama and its tokenizer, both written by `save_pretrained`."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    make_tiny("llama").save_pretrained(folder)
    make_tokenizer(words=117).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 4,000 words from the vocabulary of the tiny Llama's tokenizer, some frequent and many rare."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "words.txt"
    file.write_text(" ".join(f"w{min(116, int(draw.expovariate(1 / 30)))}" for _ in range(4000)))
    return file


@pytest.fixture(scope="session")
def configure(model_folder: Path, text_file: Path) -> Configure:
    """A function that makes configurations of tiny language runs; see `tests.elastic.runs.configurations`."""
    return configurations(RUN_SETTINGS, model=str(model_folder), data__source=str(text_file), budget__target=0.8)


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, configure: Configure, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny language run, made once per test module, with the module's settings RUN if any."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    distill(configure(*getattr(request.module, "RUN", ())), folder)
    return folder


@pytest.fixture(params=sorted(TINY))
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny language model, of each supported architecture in turn."""
    return make_tiny(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    """A tiny Llama."""
    return make_tiny("llama")


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token ids [2, 12]."""
    return torch.randint(3, 120, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def padding(tokens: torch.Tensor) -> torch.Tensor:
    """An attention mask of `tokens` that takes the first four of the first row for padding."""
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    return mask


@pytest.fixture
def pixels() -> torch.Tensor:
    """Images [3, 3, 16, 16]."""
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Disable autograd for the test."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="session", autouse=True)
def library(cache_folder: Path) -> object:
    """The compiled library of C operators, in use in every test as in every run; None where there is no C compiler."""
    toolchain.build(cache_folder)
    return toolchain.loaded


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Run the operators on each available backend in turn; the value is the device that their tensors have to be on."""
    library = request.getfixturevalue("library") if request.param == "c" else None
    with running_on(request.param, library) as device:
        yield device


@pytest.fixture(params=["c", "reference"])
def operators(request: pytest.FixtureRequest, library: object) -> Iterator[None]:
    """Run the operators on each backend that is fast enough for whole models on a CPU: in C, and as references."""
    with running_on(request.param, library):
        yield
