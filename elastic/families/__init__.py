"""Families of models: language, image and vision-language.

`of` gives a family's module, which answers what commands ask (see `Family`). No other module of this package asks which
family a model is of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol, cast

from elastic.traits import TRAITS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from elastic.config import RunConfig
    from elastic.distillation.dial import Meter
    from elastic.evaluation.session import Session
    from elastic.evaluation.teacher import TeacherOutputs
    from elastic.reporting.progress import Say
    from elastic.timing.passes import Contender, Models, Row
    from elastic.timing.workload import InputSizes, StepSizes, TrainingBatch, Workload
    from students.calibration.price import Start
    from teachers import Teacher


def of(family: str) -> Family:
    """The module of a family: "llm", "vit" or "vlm"."""
    return cast(Family, import_module(TRAITS[family].module))


class Timing(Protocol):
    """What `elastic bench` asks of a family: a module of elastic/timing."""

    OPTIONS: tuple[str, ...]
    """Those of "tokens" and "new_tokens" that have an effect."""
    BATCHES: tuple[int, ...]
    """Batch sizes that are timed where none is asked for."""
    RANDOM: Mapping[str, int]
    """Flags that say how much random data a student with random weights is calibrated on: quality is no matter, and
    gates that are chosen from little take as long as others."""

    def samples(self, config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
        """How many windows, images or questions the largest piece of work takes."""

    def fitted(self, student: Any, workload: Workload) -> Workload:
        """The workload as far as the model reads so much; ValueError where it does not."""

    def contenders(self, student: Any, dense: nn.Module) -> dict[str, Contender]:
        """The "student" and the "dense" model, as they are run."""

    def recorded(self, model: nn.Module) -> Contender:
        """A dense model, run through recordings on GPUs as students are."""

    def inference(self, student: Any, models: Models, data: Any, workload: Workload, say: Say) -> Iterator[Row]:
        """Rows of timings, where the dial is."""

    def training_batch(self, student: Any, data: Any, config: RunConfig) -> TrainingBatch:
        """A micro-batch, on the student's device."""

    def input_sizes(self, model: nn.Module, config: RunConfig, workload: Workload) -> InputSizes:
        """How much is read at once by a model with random weights, which may be on the device "meta"."""

    def step_sizes(self, student: Any, config: RunConfig) -> StepSizes:
        """What a training step does with a sample; the student may be on the device "meta"."""


class Generation(Protocol):
    """What `elastic generate` asks of a family: a module of elastic/generation."""

    def read_image(self, model: str, image: str | None) -> Any:
        """The image in a file; ValueError where the model needs one and there is none, or the other way round."""

    def inputs(self, processor: Any, prompt: str, picture: Any) -> tuple[dict[str, Tensor], Any]:
        """What the model is called with, and its tokenizer; picture: what `read_image` gave."""

    def compute(self, student: Any, inputs: dict[str, Tensor], whole: Tensor) -> float:
        """The share of the teacher's compute that was spent; whole [1, T]: prompt and what was generated."""


class Family(Protocol):
    """What every family's module has. Data is what `load` gives: it has .train, .held_out and .left_out."""

    UNIT: str
    """What data consists of, for the user to read."""
    BASELINES: tuple[str, ...]
    """Names of what `baseline` makes."""
    METRICS: tuple[tuple[str, str, str], ...]
    """What a report plots against compute: key, label, and whether "lower" or "higher" is better."""
    timing: Timing
    generation: Generation | None
    """None: its models generate no text."""
    score_correlations: Callable[..., dict[str, float]] | None
    """(student, student, data to measure on) -> rank correlation of their scores by router; None: not defined."""

    def load(self, config: RunConfig, teacher: Teacher) -> Any:
        """The run's data, the same every time."""

    def load_all(self, source: str, config: RunConfig, teacher: Teacher) -> Any:
        """Data to measure on: the validation part of a source, or all of it."""

    def random_data(self, config: RunConfig, model: nn.Module) -> Any:
        """Data without a source, for models with random weights: as much to train on as is calibrated on."""

    def summary(self, data: Any, config: RunConfig) -> str:
        """What there is, for the user to read."""

    def tokens(self, student: Any, data: Any, config: RunConfig) -> Any:
        """What the model reads at once, as `student.uniform` takes it: tokens of text; of text and of the image; an
        image's height and width."""

    def Batches(self, data: Any, config: RunConfig) -> Any:
        """Training samples by number, on the host: len(), read(chosen) -> batch, and keyed(chosen) -> batch and for
        each sample the 16 bytes that caches of the teacher's outputs know it by, a digest of what the model reads."""

    def Distillation(self, student: Any, loss: Any, budget: Any, data: Any) -> nn.Module:
        """The objective: called with a batch, the price of compute (a number, or [B]) and the teacher's signals it
        returns the loss and Measured, whose `rows` are "kl" and "compute" of each row. teacher_signals(batch) makes
        signals, and is called where none are given; lengths(batch) says how many rows of them each sample has; `keeps`
        names their kind."""

    def start(self, student: Any, data: Any, order: Tensor, config: RunConfig, session: Session) -> Start:
        """Calibration, for all budgets that are trained (see distillation/budgets.py); order: the numbers of training
        samples, shuffled; session: with what others saw in them."""

    def compute_meter(self, student: Any, data: Any, order: Tensor, config: RunConfig) -> Meter:
        """What measures the compute that the dial is set by; order: as in `start`."""

    def evaluate(
        self, student: Any, held_out: Any, config: RunConfig, kept: TeacherOutputs | None = None
    ) -> dict[str, Any]:
        """A row's measurements; kept: what the teacher made of the same data before."""

    def baseline(
        self, name: str, student: Any, held_out: Any, config: RunConfig, compute: float, session: Session
    ) -> dict[str, Any]:
        """As `evaluate`, for something untrained at this compute; session: with what has been found out before."""

    def routing(self, student: Any, held_out: Any, teacher: Teacher, config: RunConfig) -> dict[str, Any]:
        """Where compute goes, and examples (see accounting/routing.py)."""

    def lines(self) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
        """How a table shows a row of results."""
