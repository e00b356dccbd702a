"""What a trained language student has to beat, on the same frozen weights and at the same compute: choices of input
channels, and of rows of the LM head, that no training made.

random   any channels and rows, anew for each token, as many at each site as the student opens there
uniform  every linear layer keeps the same share of its channels, and the head (where the student routes it) the same
         share of its rows; which ones goes by the estimated cost of closing them (see students/calibration/language.py)
static   the same channels for every token, those of each linear layer that cost most to close, the same share of every
         layer; the LM head whole; saves in prefill too
teal     the largest magnitudes: one threshold for each linear layer, at which all keep the same share; the LM head
         whole (arXiv 2408.14690, without its search for a share of its own for each layer)

They run as students do, with limits that are set here instead of trained, and without low-rank corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.config import RunConfig
from elastic.distillation.dial import capacity_for
from students import elasticize
from students.architectures import LINEAR_SITES
from students.calibration.data_shard import BatchInfo, DataShard
from students.calibration.language import Seen, calibrate
from students.decisions import Decisions
from students.execution.head import RoutedHead
from students.execution.linear import RoutedLinear
from students.families.language import LanguageStudent
from students.routers import OPEN
from students.spec import RouterSpec, StudentSpec

LEVELS = 513
"""Quantiles that are kept of what a limit is compared with."""
ROWS = 64
"""Tokens of a calibration batch that they are taken of."""
HEAD_NUMBERS = 2**23
"""Previewed logits of a batch that they are taken of."""
REFERENCE = 0.7
"""The compute that calibration starts limits at, before they move to wherever they are wanted."""
TOLERANCE = 0.001
"""How near to the student's measured compute has to come before the search ends."""


class SameShares:
    """`uniform`, `static` or `teal`, made of a frozen model: every site keeps the same share of its channels.

    vocab: the student's router of the LM head, for `uniform` where it has one. frozen: makes the model. batches:
    calibration text, token ids [B, T], which is looked at once, whatever the budgets; shard: which of the batches of
    all processes these are (None: all). seen: what calibration sees of them, which is the same for all names.
    ValueError where the choice saves nothing in the run's phase.

    The price of `calibrate` would spread the saving of fixed channels unevenly, and far worse: their errors are the
    same for every token and add up. Only the limits' differences within a site are taken over from it.
    """

    def __init__(
        self,
        name: str,
        vocab: RouterSpec | None,
        frozen: Callable[[], nn.Module],
        config: RunConfig,
        batches: Sequence[Tensor],
        seen: Callable[[LanguageStudent], Seen | None] = lambda _: None,
        shard: DataShard | None = None,
    ) -> None:
        self.name = name
        self.phase = config.budget.phase
        if self.phase == "prefill" and name != "static":
            raise ValueError(
                f"the baseline {name} chooses channels token by token, which saves nothing in prefill, this run's "
                "phase; static does"
            )
        channels = RouterSpec("channel", network="static" if name == "static" else "linear")
        self.student = _elasticized(frozen(), StudentSpec((channels, vocab) if vocab else (channels,)))
        self._batches, self._seed, self._seen, self._shard = batches, config.train.seed, seen, shard or DataShard()
        self._limits: dict[str, tuple[nn.Parameter, Tensor]] = {}
        """Of each site, and what its channels' limits were when `_levels` were taken."""

    def at(self, compute: float, meter: Callable[[LanguageStudent], float]) -> LanguageStudent:
        """The student at this share of the teacher's compute: the limits of each site move together until the meter,
        which measures a student's compute, says so. ValueError where so much cannot be saved."""
        student, tokens, phase = self.student, self._batches[0].shape[1], self.phase
        lowest = student.compute.uniform(0.0, tokens, phase)
        if compute < lowest:
            raise ValueError(
                f"the baseline {self.name} cannot run at {compute:.3f}: with every channel closed {lowest:.3f} is left"
            )
        if not self._limits:
            self._look()
        share = capacity_for(student, tokens, compute, phase)
        slope = student.compute.uniform(1.0, tokens, phase) - lowest
        for _ in range(6):
            self._keep(share)
            missing = compute - meter(student)
            if abs(missing) <= TOLERANCE:
                break
            share = min(1.0, max(0.0, share + missing / slope))
        return student

    def _look(self) -> None:
        """Calibrate, and see how the limits divide the calibration text."""
        student = self.student
        if self.name != "teal":
            calibrate(student, self._batches, REFERENCE, self.phase, self._seed, self._seen(student), self._shard)
        self._levels = _levels(student, self._batches, self._shard)
        limits = {key: layer.routers["channel"].log_limit for key, layer in _sites(student).items()}
        self._limits = {key: (limit, limit.detach().clone()) for key, limit in limits.items()}

    @torch.no_grad()
    def _keep(self, share: float) -> None:
        """Let every site keep this share of its channels on the calibration text."""
        place = (1 - share) * (LEVELS - 1)
        for key, (limit, shape) in self._limits.items():
            limit.copy_(shape + _between(self._levels[key], place))
        head = self.student.model.get_output_embeddings()
        if isinstance(head, RoutedHead):
            head.routers["vocab"].spread.fill_(_between(self._levels["vocab"], place))


def at_random(
    student: LanguageStudent,
    frozen: Callable[[], nn.Module],
    config: RunConfig,
    compute: float,
    batches: Sequence[Tensor],
    shard: DataShard | None = None,
) -> LanguageStudent:
    """The student's channels and rows drawn at random, made of a frozen model, at this share of its compute.

    frozen: makes the model. batches: token ids [B, T] on which the student says how much it opens at each site; shard:
    which of the batches of all processes these are (None: all). The odds of all sites are multiplied by one number, so
    that what the student pays for low-rank corrections may be spent on channels. ValueError where the student has
    routers of other kinds, or runs as the teacher.
    """
    drawn = [r for r in student.spec.routers if r.of_kind.over_channels or r.of_kind.place == "head"]
    odd = sorted({r.kind for r in student.spec.routers if r not in drawn})
    if odd or config.budget.phase == "prefill" or student.runtime.bypass:
        why = f"this one has {', '.join(odd)} routers" if odd else "this one routes nothing in its phase and budget"
        raise ValueError(f"the baseline random draws the channels and LM-head rows of a student in decoding; {why}")
    opened = _shares(student, batches, shard)
    routers = tuple(
        RouterSpec(r.kind, r.sites, r.blocks) if r.of_kind.over_channels else r for r in student.spec.routers
    )
    other = _elasticized(frozen(), StudentSpec(routers, gains=student.spec.gains))
    whole = torch.ones(1, batches[0].shape[1], dtype=torch.bool)

    def shares_at(offset: float) -> dict[str, Tensor]:
        return {key: (share.logit() + offset).sigmoid().view(1, 1) for key, share in opened.items()}

    low, high = -20.0, 20.0
    for _ in range(40):
        middle = (low + high) / 2
        spent = float(other.compute.ratio(Decisions(share=shares_at(middle)), whole, "decode"))
        low, high = (low, middle) if spent > compute else (middle, high)
    shares = {key: float(share) for key, share in shares_at(low).items()}
    generator = torch.Generator().manual_seed(config.train.seed)
    for key, layer in _sites(other).items():
        layer.register_forward_pre_hook(_keep_at_random(shares[f"{key}.channel"], generator))
    head = other.model.get_output_embeddings()
    if isinstance(head, RoutedHead):
        head.routers["vocab"].load_state_dict(student.model.get_output_embeddings().routers["vocab"].state_dict())
        other.model.set_output_embeddings(_RandomRows(head, shares["vocab"], generator))
    return other


def _elasticized(model: nn.Module, spec: StudentSpec) -> LanguageStudent:
    student = elasticize(model, spec)
    assert isinstance(student, LanguageStudent), "baselines of text are of language models"
    return student


def _keep_at_random(
    share: float, generator: torch.Generator
) -> Callable[[RoutedLinear, tuple[Tensor]], tuple[Tensor] | None]:
    """A hook that leaves each channel with this probability and sets the others to zero, which every limit closes."""

    def hook(layer: RoutedLinear, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if layer.runtime.bypass:
            return None
        (x,) = args
        return (x * (torch.rand(x.shape, generator=generator) < share).to(x.device),)

    return hook


class _RandomRows(RoutedHead):
    """The LM head, exact for rows drawn at random and previewed for the rest."""

    def __init__(self, head: RoutedHead, share: float, generator: torch.Generator) -> None:
        super().__init__(head.base_layer, head.runtime, head.routers["vocab"], head.spec)
        self.share = share
        self.generator = generator

    def routed_logits(
        self,
        hidden: Tensor,
        spread: Tensor,
        tail: Tensor,
        preview_weight: Tensor,
        log_gain: Tensor,
        owner: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        exact = self.base_layer(hidden)
        guess = F.linear(self.routers["vocab"].features(hidden), preview_weight) + tail.to(hidden.dtype)
        open_ = (torch.rand(exact.shape, generator=self.generator) < self.share).to(exact.device)
        return torch.where(open_, exact, guess), open_.float().mean(-1)

    def _some_rows(self, hidden: Tensor, dial: float | Tensor) -> tuple[Tensor, Tensor]:
        return self.routed_logits(hidden, *self.tensors())


def _sites(student: LanguageStudent) -> dict[str, RoutedLinear]:
    """The first linear layer of each site with a channel router, which chooses for the others, by the site's name."""
    layers = {
        f"{number}.{site}": block.get_submodule(student.record.linears(site)[0])
        for number, block in enumerate(student.blocks)
        for site in LINEAR_SITES
    }
    return {
        key: layer for key, layer in layers.items() if isinstance(layer, RoutedLinear) and "channel" in layer.routers
    }


@torch.no_grad()
def _levels(student: LanguageStudent, batches: Sequence[Tensor], shard: DataShard) -> dict[str, Tensor]:
    """Quantiles [LEVELS] of what the limits of each site are compared with, in the frozen model: by how much log|x|
    exceeds log_limit (static: 0, whatever x is); of "vocab": by how many |f| a row's preview exceeds the mean. Means
    over the batches."""
    levels: dict[str, Tensor] = {}
    info = BatchInfo(0, True)

    def add(key: str, values: Tensor) -> None:
        places = torch.linspace(0, values.numel() - 1, LEVELS, device=values.device)
        quantiles = values.flatten().sort().values[places.long()] * info.counts
        levels[key] = levels[key] + quantiles if key in levels else quantiles

    def watch(key: str, layer: RoutedLinear) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            router = layer.routers["channel"]
            size = _sample(args[0], ROWS).abs().float().log().clamp(min=OPEN)
            add(key, -router.log_limit if router.spec.network == "static" else size - router.log_limit)

        return layer.register_forward_pre_hook(hook)

    head, counted = student.model.get_output_embeddings(), 0
    handles = [watch(key, layer) for key, layer in _sites(student).items()]
    try:
        with student.teacher():
            for ids, info in shard.enumerate(batches):
                counted += info.counts
                hidden = student.features(ids)[0].last_hidden_state
                if isinstance(head, RoutedHead):
                    router, (_, _, preview_weight, _) = head.routers["vocab"], head.tensors()
                    features = router.features(_sample(hidden, max(1, HEAD_NUMBERS // len(preview_weight))))
                    mean = router.limit(features, torch.zeros_like(router.spread), 1.0, 0.0)
                    length = features.float().norm(dim=-1, keepdim=True)
                    add("vocab", (F.linear(features, preview_weight).float() - mean) / length)
    finally:
        for handle in handles:
            handle.remove()
    return {key: shard.all_reduce(level) / shard.all_reduce(level.new_tensor(counted)) for key, level in levels.items()}


def _sample(x: Tensor, rows: int) -> Tensor:
    """At most so many tokens of x [B, T, D], evenly spaced: [n, D]."""
    flat = x.flatten(0, 1)
    return flat[torch.linspace(0, len(flat) - 1, min(rows, len(flat)), device=x.device).long()]


def _between(levels: Tensor, place: float) -> float:
    """The level at a place between two of them."""
    below = min(int(place), LEVELS - 2)
    return float(torch.lerp(levels[below], levels[below + 1], place - below))


@torch.no_grad()
def _shares(student: LanguageStudent, batches: Sequence[Tensor], shard: DataShard | None = None) -> dict[str, Tensor]:
    """The mean share of open gates of every router, by its key."""
    sums: dict[str, Tensor] = {}
    rows, shard = 0, shard or DataShard()
    for ids, info in shard.enumerate(batches):
        rows += info.counts * len(ids)
        out, decisions = student.features(ids)
        shares = dict(decisions.share)
        if tensors := student.head_tensors():
            hidden = out.last_hidden_state.flatten(0, 1).split(128)
            exact = (student.logits(part, *tensors)[1] for part in hidden)
            shares["vocab"] = torch.cat([open_ for open_ in exact if open_ is not None])
        for key, open_ in shares.items():
            part = open_.double().mean() * len(ids) * info.counts
            sums[key] = sums[key] + part if key in sums else part
    return {key: (shard.all_reduce(x) / shard.all_reduce(x.new_tensor(rows))).float().cpu() for key, x in sums.items()}
