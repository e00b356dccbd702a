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

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architectures import Architecture, weight_of
from students.calibration.fit import VocabFit, cluster_neurons, fit_substitute, fit_vocab
from students.calibration.price import Choice, Curve, Start, gated_choice, start_at
from students.compute import Phase, saves
from students.execution.head import RoutedHead
from students.execution.linear import RoutedLinear
from students.families.language import LanguageStudent
from students.routers import OPEN, ChannelRouter, VocabRouter
from students.spec import LINEAR_SITES

ROWS_PER_BATCH = 256
"""Tokens of a batch whose activations are kept."""
PRICED_ROWS = 256
"""Tokens that channel routers are priced on."""
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

    for branch, kind, name, total in (
        (attn, "token", "attn", attention),
        (mlp, "token", "mlp", shape.mlp_in + shape.mlp_out),
        (attn, "layer", "layer", attention + shape.mlp_in + shape.mlp_out),
    ):
        gated_spec = spec.find(kind, number, name if kind == "token" else "")
        if gated_spec is None:
            continue
        place = seen[f"{number}.{name}"]
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
        total += shape.kv if gated_spec.kv == "drop" and name != "mlp" else 0
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
