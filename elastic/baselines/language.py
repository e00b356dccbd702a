"""Untrained baselines for language students, on the same frozen weights and at the same compute.

Each baseline selects input channels of linear layers, and in part rows of the LM head, without training:

random   channels and rows drawn at random for each token, as many at each site as the student opens there
uniform  the same share of the channels of every linear layer, and of the LM head's rows if the student routes the head,
         selected by the estimated cost of closing them (see students/calibration/language.py)
static   the same channels for every token: in every linear layer the same share, those that cost most to close; the
         whole LM head; the only baseline that saves compute in prefill
teal     the channels of largest magnitude, by one threshold per linear layer at which all layers keep the same share;
         the whole LM head (arXiv 2408.14690, without its search for a share per layer)

Baselines run as students do, with limits set here instead of trained, and without low-rank corrections.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic.accounting.language import exact_rows
from elastic.config import RunConfig
from elastic.distillation.dial import capacity_for, largest
from students import elasticize
from students.architectures.lookup import record_in
from students.calibration.data_shard import BatchInfo, DataShard
from students.calibration.language import Seen, calibrate
from students.decisions import Decisions
from students.execution.head import RoutedHead
from students.execution.linear import RoutedLinear
from students.families.language import LanguageStudent
from students.routers import OPEN
from students.spec import RouterSpec, StudentSpec

LEVELS = 513
"""Number of quantiles kept, per site, of the values that a limit is compared with."""
ROWS = 64
"""Tokens of a calibration batch from which the quantiles of a site's channels are taken."""
HEAD_NUMBERS = 2**23
"""Previewed logits of a calibration batch from which the quantiles of the LM head are taken, at most."""
REFERENCE = 0.7
"""Compute for which limits are first calibrated; `SameShares.at` then moves them to the compute that is asked for."""
TOLERANCE = 0.001
"""Largest distance between measured and requested compute at which the search for limits ends."""


class SameShares:
    """The baselines `uniform`, `static` and `teal`: every site keeps the same share of its channels.

    vocab: the student's LM-head router, if it has one and the baseline is `uniform`. frozen: returns the frozen model.
    batches: calibration text, token ids [B, T], which is run once for all budgets; shard: which of all processes'
    batches these are (None: all). seen: returns calibration statistics of the batches, which are the same for all
    baselines. ValueError if the baseline saves nothing in the run's phase.

    `calibrate` sets the limits of all sites by one price, which spreads the savings of fixed channels unevenly over
    sites, with far worse results, because a fixed channel's error is the same for every token and adds up. Only the
    differences between the limits within a site are therefore taken from `calibrate`.
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
        """For each site, the parameter that holds its channels' limits (logarithms), and a copy of the values at which
        `_levels` were taken."""

    def at(self, compute: float, meter: Callable[[LanguageStudent], float]) -> LanguageStudent:
        """Return the baseline's student at this share of the teacher's compute.

        All limits are moved until `meter(student)`, the measured compute, is within TOLERANCE of `compute`, for at most
        six steps. ValueError if the compute is below that with every channel closed.
        """
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
        """Calibrate the limits (not for `teal`), and take the quantiles of what they are compared with."""
        student = self.student
        if self.name != "teal":
            calibrate(student, self._batches, REFERENCE, self.phase, self._seed, self._seen(student), self._shard)
        self._levels = _levels(student, self._batches, self._shard)
        limits = {key: layer.routers["channel"].log_limit for key, layer in _sites(student).items()}
        self._limits = {key: (limit, limit.detach().clone()) for key, limit in limits.items()}

    @torch.no_grad()
    def _keep(self, share: float) -> None:
        """Set the limits such that every site keeps this share of its channels on the calibration text."""
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
    """Return the baseline `random` at this share of the teacher's compute: channels and LM-head rows drawn at random.

    frozen: returns the frozen model. batches: token ids [B, T] on which the share of open gates of each of the
    student's sites is measured; shard: which of all processes' batches these are (None: all). The odds of being open
    are multiplied by the same factor at all sites, so that the compute that the student spends on low-rank corrections
    goes to channels here. ValueError if the student has routers of other kinds, a budget of prefill, or runs as the
    teacher.
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

    def fits(offset: float) -> bool:
        return float(other.compute.ratio(Decisions(share=shares_at(offset)), whole, "decode")) <= compute

    shares = {key: float(share) for key, share in shares_at(largest(-20.0, 20.0, fits)).items()}
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
    """Return a forward pre-hook that keeps each input channel with probability `share` and sets the others to zero,
    which is below every limit, so that the layer skips them."""

    def hook(layer: RoutedLinear, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if layer.runtime.bypass:
            return None
        (x,) = args
        return (x * (torch.rand(x.shape, generator=generator) < share).to(x.device),)

    return hook


class _RandomRows(RoutedHead):
    """An LM head whose logits are exact for rows drawn at random and previewed for all others."""

    def __init__(self, head: RoutedHead, share: float, generator: torch.Generator) -> None:
        super().__init__(head.base_layer, head.runtime, head.routers["vocab"], head.spec)
        self.share = share
        self.generator = generator

    def routed_logits(self, hidden: Tensor, *tensors: Tensor, owner: Tensor | None = None) -> tuple[Tensor, Tensor]:
        exact, preview, _, tail = self._parts(hidden, tensors, owner)
        open_ = (torch.rand(exact.shape, generator=self.generator) < self.share).to(exact.device)
        return torch.where(open_, exact, preview + tail.to(hidden.dtype)), open_.float().mean(-1)

    def open_share(self, hidden: Tensor, *tensors: Tensor, owner: Tensor | None = None) -> Tensor:
        return hidden.new_full(hidden.shape[:-1], self.share, dtype=torch.float32)

    def _some_rows(self, hidden: Tensor, dial: float | Tensor) -> tuple[Tensor, Tensor]:
        return self.routed_logits(hidden, *self.tensors())


def _sites(student: LanguageStudent) -> dict[str, RoutedLinear]:
    """Return, by the site's key, the first linear layer of each site with a channel router; its router decides for all
    layers of the site."""
    layers = {
        f"{number}.{site}": block.get_submodule(record.linears(site)[0])
        for number, block in enumerate(student.blocks)
        for record in [record_in(student.record, block)]
        for site in record.sites
    }
    return {
        key: layer for key, layer in layers.items() if isinstance(layer, RoutedLinear) and "channel" in layer.routers
    }


@torch.no_grad()
def _levels(student: LanguageStudent, batches: Sequence[Tensor], shard: DataShard) -> dict[str, Tensor]:
    """Return, by site, quantiles [LEVELS] of the values that decide about its gates, ascending, averaged over batches.

    The frozen model runs on batches of token ids [B, T]. For channels the values are log|x| - log_limit (static:
    -log_limit, independent of the input x); for "vocab" a row's previewed logit minus the mean preview, in units of the
    norm of the preview's features f.
    """
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
    with ExitStack() as hooks, student.teacher():
        for key, layer in _sites(student).items():
            hooks.enter_context(watch(key, layer))
        for ids, info in shard.enumerate(batches):
            counted += info.counts
            hidden = student.features(ids)[0].last_hidden_state
            if isinstance(head, RoutedHead):
                router, (_, _, preview_weight, _) = head.routers["vocab"], head.tensors()
                features = router.features(_sample(hidden, max(1, HEAD_NUMBERS // len(preview_weight))))
                mean = router.limit(features, torch.zeros_like(router.spread), 1.0, 0.0)
                length = features.float().norm(dim=-1, keepdim=True)
                add("vocab", (F.linear(features, preview_weight).float() - mean) / length)
    return {key: shard.all_reduce(level) / shard.all_reduce(level.new_tensor(counted)) for key, level in levels.items()}


def _sample(x: Tensor, rows: int) -> Tensor:
    """Return at most `rows` evenly spaced tokens [n, D] of x [B, T, D]."""
    flat = x.flatten(0, 1)
    return flat[torch.linspace(0, len(flat) - 1, min(rows, len(flat)), device=x.device).long()]


def _between(levels: Tensor, place: float) -> float:
    """Return the quantile at a fractional index of levels [LEVELS], by linear interpolation."""
    below = min(int(place), LEVELS - 2)
    return float(torch.lerp(levels[below], levels[below + 1], place - below))


@torch.no_grad()
def _shares(student: LanguageStudent, batches: Sequence[Tensor], shard: DataShard | None = None) -> dict[str, Tensor]:
    """Return the mean share of open gates of every router, by its key, over batches of token ids [B, T]."""
    sums: dict[str, Tensor] = {}
    rows, shard = 0, shard or DataShard()
    for ids, info in shard.enumerate(batches):
        rows += info.counts * len(ids)
        out, decisions = student.features(ids)
        shares = dict(decisions.share)
        if (exact := exact_rows(student, out.last_hidden_state)) is not None:
            shares["vocab"] = exact
        for key, open_ in shares.items():
            part = open_.double().mean() * len(ids) * info.counts
            sums[key] = sums[key] + part if key in sums else part
    return {key: (shard.all_reduce(x) / shard.all_reduce(x.new_tensor(rows))).float().cpu() for key, x in sums.items()}
