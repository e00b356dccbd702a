"""The closed-form start: the cost of closing each gate, from one pass over calibration text, and one price for all.

The second-order estimate of the effect of a change d of some activation on the output distribution is
KL = 1/2 sum_i F_i d_i^2 nats, with F_i = E[g_i^2] and g the gradient of -log p(y), y drawn from the model itself (the
diagonal Fisher information, as in Optimal Brain Damage). So for every gate and token there is an estimated cost of
closing the gate, in nats, and a known saving, as a share of the model's compute. A gate is closed where

    cost < price * saving

and the price is the one at which the whole model reaches the budget. Routers are initialised accordingly: channel
limits solve the inequality exactly, all other routers by a ridge regression of log(cost) on the features they read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.calibration.data_shard import BatchInfo, DataShard, batch_generator
from students.calibration.fit import VocabFit, fit_vocab
from students.calibration.observe import BlockObservers, BlockStart, Observed, Observer, moments
from students.calibration.price import Curve, Start, start_at
from students.compute import Phase
from students.execution.head import RoutedHead
from students.families.language import LanguageStudent
from students.routers import VocabRouter

ROWS_PER_BATCH = 256
"""Tokens sampled from a batch, whose activations are kept."""
Seen = dict[str, Observed]
"""Observations by place: "N.PLACE" in block N, and "hidden" for the final hidden states."""
LEAST_GAIN = 0.05
"""Lower bound of the vocab router's initial gain, reached if nearly the same limit is best for all budgets."""


def calibrate(
    student: LanguageStudent,
    batches: Sequence[Tensor],
    target: float | Sequence[float],
    phase: Phase,
    seed: int = 0,
    seen: Seen | None = None,
    shard: DataShard | None = None,
) -> Start:
    """Fit substitutes and the preview of the LM head, and initialise all routers at the price that reaches `target`.

    batches: token ids [B, T] without padding. For several targets, ascending, routers start at the geometric mean of
    the first and the last price, with gains such that one dial reaches all targets. seen: the result of `observe` for
    the same batches, seed and routers, if there is one. shard: this process's shard, which the batches are (None: a
    single process's); observations of all processes are merged one block at a time, so all get the same start.
    """
    targets = [target] if isinstance(target, float) else target
    shard = shard or DataShard()
    seen = observe(student, batches, seed, shard) if seen is None else seen
    valid = torch.ones_like(batches[0], dtype=torch.bool)
    dense = float(student.compute.dense(valid, phase).sum() / valid.sum())
    keys = valid.shape[1] if phase == "prefill" else (valid.shape[1] + 1) / 2
    choices = []
    for number in range(len(student.blocks)):
        here = {key: place.of_all(shard) for key, place in seen.items() if key.startswith(f"{number}.")}
        block = BlockStart(student, number, here, dense, keys, phase)
        for spec in student.spec.in_block(number, block.shape.attends):
            choices += spec.of_kind.start(spec, block)
    compute = student.compute.uniform(1.0, valid.shape[1], phase)
    curve = Curve(choices)
    head = student.model.get_output_embeddings()
    if not isinstance(head, RoutedHead):
        return start_at(choices, curve, [compute] * len(targets), targets)
    hidden = shard.all_gather(seen["hidden"].inputs)
    fits = fit_vocab(head, hidden, scale=student.logit_scale)
    whole = student.compute.head / dense if phase == "decode" else 0.0

    def lost(fit: VocabFit, target: float) -> float:
        """Return the estimated KL if the head takes this setting and the blocks save the rest."""
        return fit.kl + curve.lost(curve.price(compute - whole * (1 - fit.share), target))

    best = [min(fits, key=lambda fit: lost(fit, target)) for target in targets]
    start = start_at(choices, curve, [compute - whole * (1 - fit.share) for fit in best], targets)
    router = head.routers["vocab"]
    assert isinstance(router, VocabRouter)
    spreads, offsets = torch.tensor([fit.spread for fit in best]), torch.tensor(start.offsets)
    apart = len(set(start.offsets)) > 1  # offsets are all the same if only the head has to save
    slope = float(torch.stack([offsets, spreads]).cov()[0, 1] / offsets.var()) if apart else 0.0
    router.spread.data.fill_(spreads.mean() - slope * offsets.mean())
    if router.log_gain is not None:
        gain = -slope * router.features(hidden.float()).norm(dim=-1).mean()
        router.log_gain.data.copy_(gain.clamp(min=LEAST_GAIN).log())
    return start


def places(student: LanguageStudent) -> frozenset[tuple[str, str]]:
    """Return the pairs (place, quantity) that `observe` records for this student's routers, and of how many exempt
    tokens it does not.

    A student whose pairs are among those of another student can start from the other's observations.
    """
    pairs = frozenset(
        (key, what)
        for observers in _observers(student)
        for key, at in observers.items()
        for what in ("fisher", "inputs", "outputs", "moments")
        if what == "fisher" or getattr(at, what)
    )
    return pairs | {("exempt", str(_exempt(student)))}


def _exempt(student: LanguageStudent) -> int:
    """Return how many tokens at the start of a text some router exempts."""
    return max((router.prefix for router in student.spec.routers), default=0)


def _observers(student: LanguageStudent) -> Iterator[dict[str, Observer]]:
    """Yield the observers of each block, by place."""
    for number in range(len(student.blocks)):
        observers = BlockObservers(student, number)
        for router in student.spec.in_block(number, student.compute.blocks[number].attends):
            router.of_kind.observe(router, observers)
        yield observers.by_name


def observe(student: LanguageStudent, batches: Sequence[Tensor], seed: int = 0, shard: DataShard | None = None) -> Seen:
    """Run the frozen model forward and backward over this process's batches, and return the observations.

    Tokens that are exempt from routing are not observed in blocks: the first ones of a text, on which the others'
    attention rests, have activations so much larger than theirs that they alone would decide what is fitted.
    """
    seen: Seen = {}
    exempt = _exempt(student)
    rows = torch.empty(0, dtype=torch.long)
    info = BatchInfo(0, True)
    hooks = ExitStack()

    def routed(x: Tensor) -> Tensor:
        """Return those tokens [n, D] of x [..., D], which has all tokens of the batch, that are observed."""
        rest = x.flatten(0, -2).unflatten(0, (len(ids), -1))[:, min(exempt, ids.shape[1] - 1) :]
        return info.counted(rest.flatten(0, 1))

    def observe_place(place: Observed, at: Observer) -> None:
        waiting: list[Tensor] = []

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: object) -> None:
            waiting.append((args[0] if args else kwargs["hidden_states"]).detach())

        def leave(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            x, y = waiting.pop(), out[0] if isinstance(out, tuple) else out
            y.register_hook(lambda grad: _add_fisher(place, routed(grad)))
            x, y = routed(x), routed(y.detach())
            if at.residual:
                y = y - at.residual * x
            if at.inputs:
                place.inputs.append(x[rows])
            if at.outputs:
                place.outputs.append(y[rows])
            if at.moments:
                moment = moments(x, y)
                place.moments = moment if place.moments is None else place.moments + moment

        hooks.enter_context(at.module.register_forward_hook(enter, with_kwargs=True))
        hooks.enter_context(at.end.register_forward_hook(leave))

    for observers in _observers(student):
        for key, at in observers.items():
            observe_place(seen.setdefault(key, Observed()), at)
    embeddings = student.model.get_input_embeddings()
    hooks.enter_context(embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_()))
    final = seen.setdefault("hidden", Observed())
    with hooks, student.teacher(), torch.enable_grad():
        for ids, info in (shard or DataShard()).enumerate(batches):
            generator = batch_generator(seed, info.index)
            observed = len(routed(ids.unsqueeze(-1)))
            rows = torch.randperm(observed, generator=generator)[:ROWS_PER_BATCH].to(ids.device)
            hidden = student.features(ids)[0].last_hidden_state.flatten(0, 1)
            final.inputs.append(info.counted(hidden.detach()))
            _backward_fisher(student, hidden, generator)
    return seen


def _backward_fisher(student: LanguageStudent, hidden: Tensor, generator: torch.Generator) -> None:
    """Run the backward pass of sum -log p(y), y drawn from the model, in chunks of rows so that no large float32 logits
    exist."""
    grad = torch.empty_like(hidden)
    for chunk, out in zip(hidden.detach().split(32), grad.split(32), strict=True):
        leaf = chunk.requires_grad_()
        logits = student.logits(leaf)[0].float()
        noise = torch.rand(logits.shape, generator=generator).to(logits.device).clamp_(min=1e-20)
        drawn = (logits.detach() - (-noise.log()).log()).argmax(-1)  # Gumbel-max
        out.copy_(torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), leaf)[0])
    hidden.backward(grad)


def _add_fisher(place: Observed, grad: Tensor) -> None:
    """Add the squared gradients [n, D_out] of n tokens to a place's observations."""
    square = grad.detach().float().square().sum(0)
    place.fisher = square if place.fisher is None else place.fisher + square
    place.tokens += grad.shape[0]
