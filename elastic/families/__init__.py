"""Model families: language, image and vision-language.

`of` returns a family's module, which implements the protocol `Family`. Commands call this protocol; no other module of
this package branches on the family of a model.
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
    """Return the module of a family: "llm", "vit" or "vlm"."""
    return cast(Family, import_module(TRAITS[family].module))


def load_once(config: RunConfig, session: Session) -> Any:
    """Return the run's training and held-out data (see `Family.load`), loaded once in a session."""
    teacher = session.loaded(config)
    key = "data", config.data, config.train.seed
    return session.once(key, lambda: of(config.family).load(config, teacher))


def load_all_once(source: str, config: RunConfig, session: Session) -> tuple[Any, bool]:
    """Return the evaluation data of a source, and whether it is all of it (see `Family.load_all`), loaded once in a
    session."""
    teacher = session.loaded(config)
    key = "all", source, config.data.window
    return session.once(key, lambda: of(config.family).load_all(source, config, teacher))


class Timing(Protocol):
    """The part of a family that `elastic bench` uses: a module of elastic/timing."""

    OPTIONS: tuple[str, ...]
    """The names among "tokens" and "new_tokens" of the command's options that have an effect."""
    BATCHES: tuple[int, ...]
    """Batch sizes that are timed if none is given."""
    RANDOM: Mapping[str, int]
    """Settings for the amount of random data on which a student with random weights is calibrated. Little suffices:
    quality does not matter then, and the number of calibration samples has no effect on the speed of gates."""

    def samples(self, config: RunConfig, batch: Sequence[int], tokens: Sequence[int]) -> int:
        """Return how many windows, images or questions the largest timed pass takes."""

    def fitted(self, student: Any, data: Any, workload: Workload) -> Workload:
        """Return the workload adapted to the model's maximum length; ValueError if the model cannot read it."""

    def longest(self, student: Any, data: Any, workload: Workload) -> int:
        """Return the number of tokens of the longest input, what is decoded included; ValueError as in `fitted`."""

    def contenders(self, student: Any, dense: nn.Module) -> dict[str, Contender]:
        """Return the "student" and the "dense" model, each with the function that runs it."""

    def recorded(self, model: nn.Module) -> Contender:
        """Return a dense model that on GPUs runs through CUDA graphs, as students do."""

    def inference(self, student: Any, models: Models, data: Any, workload: Workload, say: Say) -> Iterator[Row]:
        """Yield rows of timings, with the student at the current position of its dial."""

    def training_batch(self, student: Any, data: Any, config: RunConfig) -> TrainingBatch:
        """Return a micro-batch on the student's device."""

    def input_sizes(self, model: nn.Module, config: RunConfig, workload: Workload) -> InputSizes:
        """Return how much a model with random weights reads at once; the model may be on the device "meta"."""

    def step_sizes(self, student: Any, config: RunConfig) -> StepSizes:
        """Return the work of a training step per sample; the student may be on the device "meta"."""


class Generation(Protocol):
    """The part of a family that `elastic generate` uses: a module of elastic/generation."""

    def read_image(self, model: str, image: str | None) -> Any:
        """Return the image in a file; ValueError if the model needs an image and none is given, or the reverse."""

    def inputs(self, processor: Any, prompt: str, picture: Any) -> tuple[dict[str, Tensor], Any]:
        """Return the model's inputs and its tokenizer; picture: the result of `read_image`."""

    def compute(self, student: Any, inputs: dict[str, Tensor], whole: Tensor) -> float:
        """Return the share of the teacher's compute that was spent; whole: tokens [1, T] of prompt and generated
        text."""


class Family(Protocol):
    """The interface of every family's module. `data` is the result of `load`, with .train, .held_out and .left_out."""

    UNIT: str
    """Name of the data's samples in messages, such as "images"."""
    BASELINES: tuple[str, ...]
    """Names that `baseline` accepts."""
    METRICS: tuple[tuple[str, str, str], ...]
    """Metrics that a report plots against compute: key, label, and whether "lower" or "higher" is better."""
    timing: Timing
    generation: Generation | None
    """Text generation; None if the family's models generate no text."""
    score_correlations: Callable[..., dict[str, float]] | None
    """(student, student, evaluation data) -> rank correlation of the students' scores by router; None if undefined."""

    def load(self, config: RunConfig, teacher: Teacher) -> Any:
        """Load the run's training and held-out data, the same at every call."""

    def load_all(self, source: str, config: RunConfig, teacher: Teacher) -> tuple[Any, bool]:
        """Load evaluation data: the held-out part of a source, or all of it if it has none (True)."""

    def random_data(self, config: RunConfig, model: nn.Module) -> Any:
        """Make random data, for models with random weights, with as many training samples as calibration reads."""

    def summary(self, data: Any, config: RunConfig) -> str:
        """Describe the data in one line for the user."""

    def tokens(self, student: Any, data: Any, config: RunConfig) -> Any:
        """Return the size of one input as `student.uniform` takes it: the number of text tokens of a window; of text
        and image tokens of a question; an image's height and width."""

    def Batches(self, data: Any, config: RunConfig) -> Any:
        """Return the training samples, on the host: len() is their number, read(chosen) returns a batch of samples by
        number, and keyed(chosen) returns the batch and, for each sample, a 16-byte digest of what the model reads,
        by which a cache of the teacher's outputs finds the sample."""

    def Distillation(self, student: Any, loss: Any, budget: Any, data: Any) -> nn.Module:
        """Return the objective. Called with a batch, the price of compute (a number, or [B]) and the teacher's signals,
        it returns the loss and Measured, whose `rows` hold "kl" and "compute" of each row.

        Its method teacher_signals(batch) computes the signals, and is called if none are given; lengths(batch) returns
        how many rows of the signals each sample has; its property `keeps` names the kind of signals.
        """

    def start(self, student: Any, data: Any, order: Tensor, config: RunConfig, session: Session, say: Say) -> Start:
        """Calibrate the student for all budgets that are trained (see distillation/budgets.py); order: shuffled numbers
        of the training samples; session: holds calibration statistics for reuse between runs."""

    def compute_meter(self, student: Any, data: Any, order: Tensor, config: RunConfig) -> Meter:
        """Return the function that measures compute while the dial is set; order: as in `start`."""

    def evaluate(
        self, student: Any, held_out: Any, config: RunConfig, kept: TeacherOutputs | None = None
    ) -> dict[str, Any]:
        """Measure quality and compute, as a row of results; kept: earlier outputs of the teacher on the same data."""

    def baselines_of(self, config: RunConfig) -> tuple[str, ...]:
        """Return those of BASELINES that can stand beside a run's routers."""

    def baseline(
        self, name: str, student: Any, held_out: Any, config: RunConfig, compute: float, session: Session
    ) -> dict[str, Any]:
        """Like `evaluate`, for an untrained baseline at this compute; session: holds calibrated baselines and the
        teacher's outputs for reuse."""

    def routing(self, student: Any, held_out: Any, teacher: Teacher, config: RunConfig) -> dict[str, Any]:
        """Return the routing profile with examples (see accounting/routing.py)."""

    def lines(self) -> list[tuple[str, Callable[[dict[str, Any]], str]]]:
        """Return (label, function from a row of results to text) for each line of a printed table."""
