"""The closed-form start: what closing each gate would cost, from one look at calibration text, and one price for all.

The second-order estimate of what a change d of some activation does to the output distribution is
KL = 1/2 sum_i F_i d_i^2 nats, with F_i = E[g_i^2] and g the gradient of -log p(y), y drawn from the model itself (the
diagonal Fisher information, as in Optimal Brain Damage). So for every gate and token there is an estimated cost of
closing it, in nats, and a known saving, as a share of the model's compute. A gate is closed where

    cost < price * saving

and the price is the one at which the whole model reaches the budget. Routers start from there: channel limits solve
the inequality exactly, the others start from a ridge regression of log(cost) on the input that they read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architecture import Architecture, weight_of
from students.compute import Phase, saves
from students.language import LanguageStudent
from students.routers import OPEN, ChannelRouter, Router, Substitute, VocabRouter
from students.spec import LINEAR_SITES
from students.wrappers import RoutedHead, RoutedLinear

ROWS_PER_BATCH = 256
"""Tokens of a batch whose activations are kept."""
PRICED_ROWS = 256
"""Tokens that channel routers are priced on."""
LOWEST, HIGHEST, FINENESS = -30.0, 15.0, 0.002
"""Logarithms of prices that are told apart."""
LEAST_GAIN = 0.05
"""Of the LM head's rows, where one limit seems best for all budgets."""


@dataclass
class Observed:
    """What was seen at one place: inputs and outputs of sampled tokens, mean squared gradients, second moments."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    fisher: Tensor | None = None
    tokens: int = 0
    moments: Tensor | None = None
    """Sum over tokens of (x, 1)^T (x, 1, y): [D + 1, D + 1 + D_out], for least squares."""


@dataclass(frozen=True)
class Start:
    """Result of a calibration."""

    price: float
    """Nats per unit of compute at which gates close."""
    compute: float
    """Predicted compute ratio."""
    prices: tuple[float, ...]
    """The price of each budget that was asked for."""

    @property
    def offsets(self) -> tuple[float, ...]:
        """How far to turn the dial from this start for each of them: a channel's cost is its magnitude squared."""
        return tuple((math.log(self.price) - math.log(price)) / 2 for price in self.prices)


@dataclass(frozen=True)
class Choice:
    """One router before the price is known: cost [rows, gates] in nats, saving of a gate, how to set the start."""

    cost: Tensor
    saving: float
    apply: Callable[[float], None]


def calibrate(
    student: LanguageStudent, batches: Sequence[Tensor], target: float | Sequence[float], phase: Phase, seed: int = 0
) -> Start:
    """Fit substitutes and the preview of the LM head, and start all routers at the price that reaches `target`.

    batches: token ids [B, T] without padding. Several targets, ascending: start between the first and the last, each
    router with the gain at which one dial reaches all of them.
    """
    targets = [target] if isinstance(target, float) else target
    generator = torch.Generator().manual_seed(seed)
    seen = _observe(student, batches, generator)
    valid = torch.ones_like(batches[0], dtype=torch.bool)
    dense = float(student.compute.dense(valid, phase).sum() / valid.sum())
    keys = valid.shape[1] if phase == "prefill" else (valid.shape[1] + 1) / 2
    choices = []
    for number in range(len(student.blocks)):
        choices += _block_choices(student, number, seen, dense, keys, phase)
    compute = student.compute.uniform(1.0, valid.shape[1], phase)
    curve = Curve(choices)
    head = student.model.get_output_embeddings()
    if not isinstance(head, RoutedHead):
        return start_at(choices, curve, [compute] * len(targets), targets)
    hidden = torch.cat(seen["hidden"].inputs)
    fits = fit_vocab(head, hidden)
    whole = student.compute.head / dense if phase == "decode" else 0.0

    def lost(fit: VocabFit, target: float) -> float:
        """Estimated KL if the head takes this setting and the blocks save the rest."""
        return fit.kl + curve.lost(curve.price(compute - whole * (1 - fit.share), target))

    best = [min(fits, key=lambda fit: lost(fit, target)) for target in targets]
    start = start_at(choices, curve, [compute - whole * (1 - fit.share) for fit in best], targets)
    router: VocabRouter = head.routers["vocab"]
    spreads, offsets = torch.tensor([fit.spread for fit in best]), torch.tensor(start.offsets)
    slope = 0.0 if len(best) == 1 else float(torch.stack([offsets, spreads]).cov()[0, 1] / offsets.var())
    router.spread.data.fill_(spreads.mean() - slope * offsets.mean())
    if router.log_gain is not None:
        gain = -slope * router.features(hidden.float()).norm(dim=-1).mean()
        router.log_gain.data.copy_(gain.clamp(min=LEAST_GAIN).log())
    return start


def start_at(choices: list[Choice], curve: Curve, compute: Sequence[float], targets: Sequence[float]) -> Start:
    """Start all routers at the price that reaches the target, or half-way between those of several.

    compute: for each target, what the student would spend if none of these gates closed.
    """
    prices = [curve.price(whole, target) for whole, target in zip(compute, targets, strict=True)]
    price = math.sqrt(prices[0] * prices[-1])
    for choice in choices:
        choice.apply(price)
    middle = (compute[0] + compute[-1]) / 2
    return Start(price, middle - curve.saved(price), tuple(prices))


def log_likelihood(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sum over rows of log p(y) for logits [N, V], y drawn from the distribution that they are."""
    logits = logits.float()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(1)
    return -F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")


class Curve:
    """What the gates of some choices save, and what is lost with them, as functions of the price they close at."""

    @torch.no_grad()
    def __init__(self, choices: list[Choice]) -> None:
        self.points = int((HIGHEST - LOWEST) / FINENESS)
        saving, losing = (torch.zeros(self.points, dtype=torch.float64) for _ in range(2))
        for choice in choices:
            rows, cost = len(choice.cost), choice.cost.flatten().cpu()
            place = ((cost / choice.saving).clamp(min=1e-30).log() - LOWEST) / FINENESS
            place = place.long().clamp(0, self.points - 1)
            saving += place.bincount(minlength=self.points) * choice.saving / rows
            losing += place.bincount(cost.double(), minlength=self.points) / rows
        self._saved, self._lost = saving.cumsum(0), losing.cumsum(0)

    def _place(self, price: float) -> int:
        return min(self.points, max(1, round((math.log(price) - LOWEST) / FINENESS))) - 1

    def saved(self, price: float) -> float:
        """Compute that is saved at this price, as a share of the model's."""
        return float(self._saved[self._place(price)])

    def lost(self, price: float) -> float:
        """Estimated KL of everything that closes at this price, in nats per token."""
        return float(self._lost[self._place(price)])

    def price(self, compute: float, target: float) -> float:
        """The lowest price at which `compute` comes down to `target`."""
        place = int(torch.searchsorted(self._saved, compute - target)) + 1
        return math.exp(LOWEST + FINENESS * min(place, self.points))


def _observe(student: LanguageStudent, batches: Sequence[Tensor], generator: torch.Generator) -> dict[str, Observed]:
    """Run the frozen model forward and backward over the batches and keep what calibration needs."""
    seen: dict[str, Observed] = {}
    rows = torch.empty(0, dtype=torch.long)
    handles = []

    def watch(key: str, module: nn.Module, end: nn.Module, moments: bool = False, residual: bool = False) -> None:
        """Inputs of `module`, outputs of `end` (itself, or the post-norm behind it)."""
        place = seen.setdefault(key, Observed())
        waiting: list[Tensor] = []

        def enter(module: nn.Module, args: tuple, kwargs: dict, out: object) -> None:
            waiting.append((args[0] if args else kwargs["hidden_states"]).detach().flatten(0, 1))

        def leave(module: nn.Module, args: tuple, out: object) -> None:
            x, y = waiting.pop(), out[0] if isinstance(out, tuple) else out
            y.register_hook(lambda grad: _add_fisher(place, grad))
            y = y.detach().flatten(0, 1)
            if residual:
                y = y - x
            place.inputs.append(x[rows])
            place.outputs.append(y[rows])
            if moments:
                moment = _moments(x, y)
                place.moments = moment if place.moments is None else place.moments + moment

        handles.append(module.register_forward_hook(enter, with_kwargs=True))
        handles.append(end.register_forward_hook(leave))

    record, spec = student.record, student.spec
    for number, block in enumerate(student.blocks):
        for site, kind in zip(LINEAR_SITES, (None, "head", None, "expert"), strict=True):
            if spec.find("channel", number, site) or (kind and spec.find(kind, number)):
                for name in record.linears(site):
                    linear = block.get_submodule(name)
                    watch(f"{number}.{name}", linear, linear)
        layer = spec.find("layer", number)
        for branch, kind in (("attn", "head"), ("mlp", "expert")):
            token = spec.find("token", number, branch)
            if token or spec.find(kind, number) or (layer and branch == "attn"):
                module = block.get_submodule(getattr(record, branch))
                late = getattr(record, f"{branch}_exit")
                end = block.get_submodule(late) if late else module
                watch(f"{number}.{branch}", module, end, moments=bool(token and token.substitute))
        if layer:
            watch(f"{number}.layer", block, block, residual=True)
    embeddings = student.model.get_input_embeddings()
    handles.append(embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_()))
    final = seen.setdefault("hidden", Observed())
    try:
        with student.teacher(), torch.enable_grad():
            for ids in batches:
                rows = torch.randperm(ids.numel(), generator=generator)[:ROWS_PER_BATCH].to(ids.device)
                hidden = student.features(ids)[0].last_hidden_state.flatten(0, 1)
                final.inputs.append(hidden.detach())
                _backward_fisher(student, hidden, generator)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _backward_fisher(student: LanguageStudent, hidden: Tensor, generator: torch.Generator) -> None:
    """Backward of sum -log p(y) with y drawn from the model, in row chunks so that no large float32 logits exist."""
    grad = torch.empty_like(hidden)
    for chunk, out in zip(hidden.detach().split(128), grad.split(128), strict=True):
        leaf = chunk.requires_grad_()
        logits = student.logits(leaf)[0].float()
        noise = torch.rand(logits.shape, generator=generator).to(logits.device).clamp_(min=1e-20)
        drawn = (logits.detach() - (-noise.log()).log()).argmax(-1)  # Gumbel-max
        out.copy_(torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), leaf)[0])
    hidden.backward(grad)


def _add_fisher(place: Observed, grad: Tensor) -> None:
    grad = grad.detach().flatten(0, -2)
    square = grad.float().square().sum(0)
    place.fisher = square if place.fisher is None else place.fisher + square
    place.tokens += grad.shape[0]


def _block_choices(
    student: LanguageStudent, number: int, seen: dict[str, Observed], dense: float, keys: float, phase: Phase
) -> list[Choice]:
    """The routers of one block that save compute in this phase, each with its estimated cost."""
    record, spec, block = student.record, student.spec, student.blocks[number]
    shape = student.compute.blocks[number]
    choices = []
    column_cost = {}
    for site in LINEAR_SITES:
        names = record.linears(site)
        places = [seen.get(f"{number}.{name}") for name in names]
        if places[0] is None:
            continue
        x = torch.cat(places[0].inputs).float()
        weights = [weight_of(block.get_submodule(name)).float() for name in names]
        importance = sum(p.fisher / p.tokens @ w.pow(2) for p, w in zip(places, weights, strict=True))
        column_cost[site] = x.pow(2) * importance / 2
        channel_spec = spec.find("channel", number, site)
        if channel_spec and saves(channel_spec, phase):
            layer = block.get_submodule(names[0])
            saving = sum(w.shape[0] for w in weights) / dense
            choices.append(_channel_choice(layer, column_cost[site][:PRICED_ROWS], importance, saving))

    attn = block.get_submodule(record.attn)
    mlp = block.get_submodule(record.mlp)
    scores = shape.per_key * keys
    attention = shape.q + shape.o + scores
    for branch, kind, site, total in (
        (attn, "head", "attn_out", attention),
        (mlp, "expert", "mlp_out", shape.mlp_in + shape.mlp_out),
    ):
        gated_spec = spec.find(kind, number)
        if gated_spec is None:
            continue
        router = branch.routers[kind]
        place = seen[f"{number}.{site.split('_')[0]}"]
        if gated_spec.grouping == "coactivation":
            neurons = torch.cat(seen[f"{number}.{record.linears(site)[0]}"].inputs).float()
            router.members.copy_(cluster_neurons(neurons, router.gates))
        cost = torch.zeros(len(column_cost[site]), router.gates, device=router.members.device)
        cost.index_add_(1, router.members, column_cost[site])
        if saves(gated_spec, phase):
            x = _features(torch.cat(place.inputs).float(), record)
            choices.append(gated_choice(router, x, cost, total / router.gates / dense))

    for branch, kind, key, total in (
        (attn, "token", f"{number}.attn", attention),
        (mlp, "token", f"{number}.mlp", shape.mlp_in + shape.mlp_out),
        (attn, "layer", f"{number}.layer", attention + shape.mlp_in + shape.mlp_out),
    ):
        gated_spec = spec.find(kind, number, key.split(".")[1] if kind == "token" else "")
        if gated_spec is None:
            continue
        place = seen[key]
        # the block's input is the residual stream, but its router and substitute read what attention reads
        reads = place if kind == "token" else seen[f"{number}.attn"]
        x, y = torch.cat(reads.inputs).float(), torch.cat(place.outputs).float()
        missing = y
        if kind in branch.substitutes:
            substitute = branch.substitutes[kind]
            if kind == "token":
                fit_substitute(substitute, place.moments)
            else:
                fit_substitute(substitute, _moments(x, y))
            total -= substitute.macs()
            missing = y - substitute(x)
        total += shape.kv if gated_spec.kv == "drop" and key.split(".")[1] != "mlp" else 0
        cost = (missing.pow(2) @ (place.fisher / place.tokens) / 2).unsqueeze(-1)
        choices.append(gated_choice(branch.routers[kind], _features(x, record), cost, total / dense))
    return choices


def _features(x: Tensor, record: Architecture) -> Tensor:
    """What a branch's routers read of its input."""
    return x if record.prenorm else F.rms_norm(x, x.shape[-1:])


def _moments(x: Tensor, y: Tensor) -> Tensor:
    xy = torch.cat([x, torch.ones_like(x[:, :1]), y], 1).float()
    return xy[:, : x.shape[1] + 1].T @ xy


def _channel_choice(layer: RoutedLinear, cost: Tensor, importance: Tensor, saving: float) -> Choice:
    router: ChannelRouter = layer.routers["channel"]
    if router.spec.network == "static":
        cost = cost.mean(0, keepdim=True)

    @torch.no_grad()
    def apply(price: float) -> None:
        if router.spec.network == "static":
            limit = price * saving / cost[0].clamp(min=1e-30)
        else:
            limit = 2 * price * saving / importance.clamp(min=1e-30)
        router.log_limit.copy_((limit.log() / 2).clamp(OPEN, -OPEN))

    return Choice(cost, saving, apply)


def gated_choice(router: Router, x: Tensor, cost: Tensor, saving: float) -> Choice:
    """A router that predicts log(cost): by ridge regression, or as the mean where it has no input.

    The last column of x is the distance to the token that would take each in, where tokens merge.
    """
    logs = cost.clamp(min=1e-12).log()
    static = router.spec.network == "static"
    if static:
        logs = cost.mean(0, keepdim=True).clamp(min=1e-12).log()
        weight, predicted = None, logs
    else:
        weight = ridge(x, logs)
        predicted = x @ weight[:-1] + weight[-1]

    @torch.no_grad()
    def apply(price: float) -> None:
        threshold = torch.tensor(price * saving).log()
        if static:
            router.score.copy_(logs[0] - threshold)
        else:
            maps = weight[:-1]
            if router.unlike is not None:
                router.unlike.copy_(maps[-1, 0])
                maps = maps[:-1]
            router.linear.weight.copy_(maps.T)
            router.linear.bias.copy_(weight[-1] - threshold)
        if router.log_gain is not None:
            router.log_gain.fill_(math.log(2))  # scores are logarithms of costs, limits of their square roots

    return Choice(predicted.exp(), saving, apply)


def ridge(x: Tensor, y: Tensor, strength: float = 0.03) -> Tensor:
    """Ridge regression of y [rows, k] on x [rows, D] with an unpenalised bias: [D + 1, k], the bias last.

    strength: the penalty, as a share of the inputs' mean variance times the number of rows.
    """
    centre, target = x.mean(0), y.mean(0)
    moved = x - centre
    gram = moved.T @ moved
    gram.diagonal().add_(strength * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, moved.T @ (y - target))
    return torch.cat([weight, (target - centre @ weight).unsqueeze(0)])


@torch.no_grad()
def fit_substitute(substitute: Substitute, moments: Tensor) -> None:
    """Reduced-rank regression: the rank-r affine map with the least squared error on the calibration tokens.

    moments: sum of (x, 1)^T (x, 1, y), [D + 1, D + 1 + D_out]. Least squares, then truncation in the metric of the
    inputs' covariance (not of the weights), which is the optimum under a rank constraint.
    """
    rank, width = substitute.down.shape
    moments = moments.double()
    count = moments[width, width]
    mean_x, mean_y = moments[width, :width] / count, moments[width, width + 1 :] / count
    cov = moments[:width, :width] / count - mean_x.outer(mean_x)
    cross = moments[:width, width + 1 :] / count - mean_x.outer(mean_y)
    cov.diagonal().add_(1e-4 * cov.diagonal().mean())
    inverse_root = _roots(cov)[1]
    u, s, v = torch.linalg.svd(inverse_root @ cross, full_matrices=False)
    substitute.down.copy_((inverse_root @ u[:, :rank]).T)
    substitute.up.copy_((s[:rank, None] * v[:rank]).T)
    substitute.bias.copy_(mean_y - mean_x @ inverse_root @ u[:, :rank] @ (s[:rank, None] * v[:rank]))


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a positive matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp(min=values.max() * 1e-10).sqrt()
    return (vectors * roots) @ vectors.T, (vectors / roots) @ vectors.T


@dataclass(frozen=True)
class VocabFit:
    """What a preview costs at one setting: share of exact rows, KL to the exact head in nats, the limit's spread."""

    share: float
    kl: float
    spread: float


@torch.no_grad()
def fit_vocab(head: RoutedHead, hidden: Tensor, rows: int = 512) -> list[VocabFit]:
    """Fit the preview of the LM head to final hidden states [n, D]; returns how good it is at several shares of rows.

    The preview is the rank-r map of h with the least squared error of all logits: a truncation in the metric of the
    head's weight on one side and of the hidden states' second moments on the other. Its basis is orthonormal in the
    first metric, so that |f| measures how far a token's previewed logits spread.
    """
    router: VocabRouter = head.routers["vocab"]
    weight = head.base_layer.weight
    hidden = hidden.float()
    gram = sum(part.float().T @ part.float() for part in weight.split(8192)).double()
    left, left_inverse = _roots(gram)
    right, right_inverse = _roots((hidden.T @ hidden / len(hidden)).double())
    u, s, v = torch.linalg.svd(left @ right)
    rank = router.down.shape[0]
    scale = len(weight) ** 0.5  # so that the mean square of a token's preview is |f|^2
    router.up.copy_(left_inverse @ u[:, :rank] * scale)
    router.down.copy_(s[:rank, None] * v[:rank] @ right_inverse / scale)
    preview_weight = router.preview_weight(weight).float()
    router.slope.copy_(preview_weight.mean(0))
    fits = []
    picked = hidden[torch.linspace(0, len(hidden) - 1, min(rows, len(hidden)), device=hidden.device).long()]
    shares = (0.03, 0.06, 0.09, 0.12, 0.18, 0.25)
    sums = torch.zeros(len(shares), 3)  # KL, spread, tail
    for part in picked.split(64):
        features = part @ router.down.T
        preview, exact = features @ preview_weight.T, part @ weight.float().T
        log_p = exact.log_softmax(-1)
        above = (preview - features @ router.slope.unsqueeze(-1)) / features.norm(dim=-1, keepdim=True)
        ranked = above.topk(round(max(shares) * len(weight)), dim=-1).values
        for place, share in enumerate(shares):
            spread = ranked[:, round(share * len(weight)) - 1]
            closed = above < spread.unsqueeze(-1)
            tail = (exact - preview)[closed].float().var() / 2  # E[exp(preview + normal error)]
            log_q = torch.where(closed, preview + tail, exact).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            sums[place] += torch.stack([kl.sum(), spread.sum(), tail * len(part)]).cpu()
    for share, (kl, spread, _) in zip(shares, (sums / len(picked)).tolist(), strict=True):
        fits.append(VocabFit(share, kl, spread))
    router.tail.copy_(sums[1, 2] / len(picked))
    return fits


def cluster_neurons(activations: Tensor, groups: int, rounds: int = 8) -> Tensor:
    """Groups of equal size (within one) of neurons that are active together: activations [rows, F] -> group [F].

    Balanced k-means on the direction of each neuron's |activation| over the rows; in every round neurons choose in
    the order of how sure they are.
    """
    profiles = F.normalize(activations.abs().T, dim=1)
    neurons = len(profiles)
    centres = profiles[torch.linspace(0, neurons - 1, groups).long()]
    member = torch.zeros(neurons, dtype=torch.long)
    for _ in range(rounds):
        likeness = profiles @ F.normalize(centres, dim=1).T
        best = likeness.topk(min(2, groups), dim=1).values
        order = (best[:, 0] - best[:, -1]).argsort(descending=True).tolist()
        ranked = likeness.argsort(dim=1, descending=True).tolist()
        room = [neurons // groups + (group < neurons % groups) for group in range(groups)]
        for neuron in order:
            group = next(g for g in ranked[neuron] if room[g])
            room[group] -= 1
            member[neuron] = group
        centres = torch.zeros_like(centres).index_add_(0, member.to(centres.device), profiles)
    return member.to(activations.device)
