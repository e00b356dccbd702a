"""The family of causal language models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from elastic import launch
from elastic.accounting.language import measured_compute
from elastic.baselines import language as baselines
from elastic.config import RunConfig
from elastic.data_parallel import scatter
from elastic.distillation.budgets import trained_budgets
from elastic.distillation.dial import Meter
from elastic.distillation.teacher_cache import digest
from elastic.evaluation.language import METRICS as METRICS
from elastic.evaluation.language import evaluate as evaluate
from elastic.evaluation.language import lines as lines
from elastic.evaluation.language import routing as routing
from elastic.evaluation.session import Session
from elastic.families import Generation, Timing, load_once
from elastic.generation import language as generation_language
from elastic.objectives.language import Distillation as Distillation
from elastic.reporting.progress import Say, Watched
from elastic.timing import language as timing_language
from students.calibration.language import Seen, calibrate, observe, places
from students.calibration.price import Start
from students.families.language import LanguageStudent
from teachers import Teacher
from teachers.data.synthetic import random_text
from teachers.data.text import TextData, has_held_out_part, load_text, load_windows
from teachers.families.language import require_rows
from teachers.wording import number_of

timing: Timing = timing_language
UNIT = "windows"
CALIBRATED = 2
"""Windows per calibration batch."""
DIAL_WINDOWS = 16
"""Number of training windows on which the dial is set."""
generation: Generation | None = generation_language
score_correlations = None
"""None: undefined for language students, whose routers switch different kinds of gates."""
BASELINES = ("random", "uniform", "static", "teal")
"""Names that `baseline` accepts; see elastic/baselines/language.py."""


def load(config: RunConfig, teacher: Teacher) -> TextData:
    """Load the run's training and held-out windows, the same at every call. ValueError if `data.window` is longer than
    the model's maximum length."""
    timing_language.require_positions(config, teacher.model)
    data = load_text(
        config.data.source,
        teacher.processor,
        window=config.data.window,
        held_out=config.data.held_out,
        seed=config.train.seed,
        max_tokens=config.data.max_tokens,
    )
    for windows in (data.train, data.held_out):
        require_rows(teacher.model, teacher.processor, windows)
    return data


def random_data(config: RunConfig, model: Any) -> TextData:
    """Make windows of random tokens, with as many training windows as calibration reads."""
    vocabulary = model.config.get_text_config().vocab_size
    counts = max(1, config.calibration.windows), config.data.held_out
    return random_text(vocabulary, config.data.window, counts, config.train.seed)


def load_all(source: str, config: RunConfig, teacher: Teacher) -> tuple[Tensor, bool]:
    """Load the held-out part of a source, or all of it if it has none (True), as token windows [N, T]."""
    windows = load_windows(source, teacher.processor, window=config.data.window)
    require_rows(teacher.model, teacher.processor, windows)
    return windows, not has_held_out_part(source)


def summary(data: TextData, config: RunConfig) -> str:
    windows = (
        f"{number_of(len(data.train), 'windows')} of {config.data.window} to train on, {len(data.held_out)} held out"
    )
    windows += f", of {data.held_out_from}" if data.held_out_from else ""
    return f"{data.description}; {windows}"


def tokens(student: LanguageStudent, data: TextData, config: RunConfig) -> int:
    """Return the number of tokens of a window."""
    return config.data.window


class Batches:
    """Training windows [N, T] of `train.window` tokens, by number."""

    def __init__(self, data: TextData, config: RunConfig) -> None:
        self.pieces = data.train.reshape(-1, config.train.window)

    def __len__(self) -> int:
        return len(self.pieces)

    def read(self, chosen: Sequence[int]) -> Tensor:
        """Return the windows [B, T] with these numbers."""
        return self.pieces[torch.tensor(chosen)]

    def keyed(self, chosen: Sequence[int]) -> tuple[Tensor, list[bytes]]:
        """Like `read`, with a digest of each window's tokens."""
        windows = self.read(chosen)
        return windows, [digest(window) for window in windows]


def start(
    student: LanguageStudent, data: TextData, order: Tensor, config: RunConfig, session: Session, say: Say
) -> Start:
    """Calibrate the student; order: shuffled numbers of the training windows; session: holds the calibration statistics
    of runs whose routers need as much or more."""
    own, shard = scatter(order[: config.calibration.windows].split(CALIBRATED))
    windows = Watched("calibrating", [data.train[part].to(next(student.parameters()).device) for part in own])
    budget, seed = config.budget, config.train.seed
    of = config.data, seed, config.calibration.windows
    seen = session.observed(of, places(student), lambda: observe(student, windows, seed, shard))
    return calibrate(student, windows, trained_budgets(budget), budget.phase, seed, seen, shard)


def compute_meter(student: LanguageStudent, data: TextData, order: Tensor, config: RunConfig) -> Meter:
    """Return the function that measures compute while the dial is set; order: shuffled numbers of the training
    windows."""
    windows = data.train[order[:DIAL_WINDOWS]].to(next(student.parameters()).device)

    def meter(share: float) -> float:
        some = windows[: math.ceil(share * len(windows))]
        return measured_compute(student, some, config.budget.phase, config.data.prompt)

    return meter


def baselines_of(config: RunConfig) -> tuple[str, ...]:
    """Return those of BASELINES that can stand beside a run's routers. Whether `optional` ones are there only the model
    says: `baseline` itself refuses what a mixture of experts cannot have."""
    if config.budget.phase == "prefill":
        return ("static",)
    certain = [r.of_kind for r in config.student.routers if not r.optional]
    drawn = all(kind.over_channels or kind.place == "head" for kind in certain)
    return BASELINES if drawn else tuple(name for name in BASELINES if name != "random")


def baseline(
    name: str, student: LanguageStudent, windows: Tensor, config: RunConfig, compute: float, session: Session
) -> dict[str, Any]:
    """Like `evaluate`, for a baseline (see elastic/baselines/language.py) at the student's compute in the run's phase.

    Compute is matched on the first DIAL_WINDOWS of the windows [N, T]; calibration reads training windows.
    """
    first = windows[:DIAL_WINDOWS].to(student.model.device)

    def frozen() -> nn.Module:
        return session.teacher(config).model

    def meter(other: LanguageStudent) -> float:
        return measured_compute(other, first, config.budget.phase, config.data.prompt)

    def same_shares() -> baselines.SameShares:
        train = launch.main_process_first(lambda: load_once(config, session)).train
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.train.seed))
        own, shard = scatter(train[order[:DIAL_WINDOWS]].to(first.device).split(CALIBRATED))
        looked_at = Watched(f"calibrating {name}", own)

        def seen(other: LanguageStudent) -> Seen:
            of = "baselines", *key[3:5]
            make = partial(observe, other, looked_at, config.train.seed, shard)
            return session.observed(of, places(other), make, keep=True)

        return baselines.SameShares(name, vocab, frozen, config, looked_at, seen, shard)

    vocab = next(iter(student.spec.at("head")), None) if name == "uniform" else None
    key = "baseline", name, vocab, config.data, config.train.seed, config.budget.phase
    session.turn_to(student)
    if name == "random":
        own, shard = scatter(first.split(CALIBRATED))
        other = baselines.at_random(student, frozen, config, compute, Watched("measuring shares", own), shard)
        session.turn_to(other)
    else:
        same = session.once(key, same_shares)
        session.turn_to(same.student)
        other = same.at(compute, meter)
    return evaluate(other, windows, config, session.kept(windows))
