"""Observations from which a language model's routers are initialised: activations and gradients of each block."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.architectures.lookup import record_in, scale_of, shape_of, values_of
from students.calibration.data_shard import DataShard
from students.calibration.fit import fit_substitute
from students.calibration.price import Choice, gated_choice
from students.compute import BlockShape, Phase
from students.execution.branch import RoutedBranch
from students.families.language import LanguageStudent
from students.routers import Router, Substitute
from students.shards import open_unit
from students.spec import RouterSpec

LEAST_SIZE = 0.1
"""Added to the size of a token's output where sizes weigh in least squares, as a share of the mean size."""


@dataclass
class Observed:
    """Observations at one place: inputs and outputs of sampled tokens, summed squared gradients, second moments."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    fisher: Tensor | None = None
    """Sum [D_out] over `tokens` tokens of the squared gradient of -log p(y) with respect to the outputs."""
    tokens: int = 0
    moments: Tensor | None = None
    """Weighted sum over tokens of (x, 1)^T (x, 1, y): [D + 1, D + 1 + D_out], for least squares (see `moments`)."""

    def of_all(self, shard: DataShard) -> Observed:
        """Return the observations of all processes at this place, merged; this process made those of its shard."""
        inputs, outputs = ([shard.all_gather(parts)] if parts else [] for parts in (self.inputs, self.outputs))
        if self.fisher is None:
            return Observed(inputs, outputs)
        tokens = shard.all_reduce(torch.tensor(self.tokens, dtype=torch.float64, device=self.fisher.device))
        moments = None if self.moments is None else shard.all_reduce(self.moments)
        return Observed(inputs, outputs, shard.all_reduce(self.fisher), int(tokens), moments)

    @property
    def x(self) -> Tensor:
        """Inputs of the sampled tokens [rows, D], float32."""
        return torch.cat(self.inputs).float()

    @property
    def y(self) -> Tensor:
        """Outputs of the sampled tokens [rows, D_out], float32."""
        return torch.cat(self.outputs).float()

    @property
    def sensitivity(self) -> Tensor:
        """Mean squared gradient [D_out] of -log p(y) with respect to the outputs."""
        assert self.fisher is not None, "nothing was seen"
        return self.fisher / self.tokens


@dataclass
class Observer:
    """What to record of a module: always gradients of the output of `end` (`module` itself or the post-norm behind it);
    on request inputs of `module` and outputs of `end` for sampled tokens, and second moments of all tokens."""

    module: nn.Module
    end: nn.Module
    inputs: bool = False
    outputs: bool = False
    moments: bool = False
    residual: float = 0.0
    """What of the input is subtracted from the output, so that the module's contribution is recorded."""


class BlockObservers:
    """The observers of one block, collected from its routers."""

    def __init__(self, student: LanguageStudent, number: int) -> None:
        self.number, self.block = number, student.blocks[number]
        self.record = record_in(student.record, self.block)
        self.by_name: dict[str, Observer] = {}

    def linears(self, site: str, outputs: bool = False) -> None:
        """Observe the linear layers of a site, and the input that they share."""
        for place, name in enumerate(self.record.linears(site)):
            self.module(name, inputs=place == 0, outputs=outputs)

    def module(self, name: str, inputs: bool = False, outputs: bool = False) -> None:
        """Observe a module of the block, given by its path."""
        module = self.block.get_submodule(name)
        observer = self.by_name.setdefault(f"{self.number}.{name}", Observer(module, module))
        observer.inputs, observer.outputs = observer.inputs or inputs, observer.outputs or outputs

    def branch(self, branch: str, moments: bool = False) -> None:
        """Observe a branch with its post-norm; moments: also record second moments of all tokens, for least squares."""
        module, late = self.block.get_submodule(getattr(self.record, branch)), getattr(self.record, f"{branch}_exit")
        observer = self.by_name.setdefault(
            f"{self.number}.{branch}", Observer(module, self.block.get_submodule(late) if late else module, True, True)
        )
        observer.moments = observer.moments or moments

    def whole(self) -> None:
        """Observe what the block adds to the residual stream."""
        scale = scale_of(self.record, self.block)
        self.by_name[f"{self.number}.layer"] = Observer(self.block, self.block, outputs=True, residual=scale)


class BlockStart:
    """One block of a student whose routers are to be initialised, with the block's observations."""

    def __init__(
        self,
        student: LanguageStudent,
        number: int,
        seen: dict[str, Observed],
        dense: float,
        keys: float,
        phase: Phase,
    ) -> None:
        self.number, self.block = number, student.blocks[number]
        self.record = record_in(student.record, self.block)
        self.shape: BlockShape = student.compute.blocks[number]
        self.dense = dense
        """Multiply-accumulates of the whole frozen model for one token; savings are shares of this."""
        self.phase = phase
        self.residual_scale = student.residual_scale * scale_of(self.record, self.block)
        """What the output of a branch is multiplied by until it leaves the block."""
        self._seen, self._keys = seen, keys
        self._importance: dict[str, Tensor] = {}

    def seen(self, name: str) -> Observed:
        """Return the observations of a branch ("attn"), of the whole block ("layer") or of a module of the block."""
        return self._seen[f"{self.number}.{name}"]

    def linears(self, site: str) -> list[nn.Module]:
        """Return the linear layers of a site, wrapped or not."""
        return [self.block.get_submodule(name) for name in self.record.linears(site)]

    def branch(self, branch: str) -> RoutedBranch:
        """Return the wrapper of a branch."""
        wrapper = self.block.get_submodule(getattr(self.record, branch))
        assert isinstance(wrapper, RoutedBranch)
        return wrapper

    def router(self, branch: str, kind: str) -> Router:
        """Return a branch's router of this kind."""
        router = self.branch(branch).routers[kind]
        assert isinstance(router, Router)
        return router

    def gated(self, branch: str) -> float:
        """Return the multiply-accumulates saved by a token that skips a branch, not counting its key and value."""
        shape = self.shape
        if branch == "attn":
            moved = shape.expand_q + shape.expand_kv * (self.phase == "decode")
            return shape.q + shape.o + moved + shape.each_key(self.phase) * self._keys
        return shape.mlp_in + shape.mlp_out + shape.mlp_experts + shape.mlp_beside * shape.follows

    @property
    def written(self) -> float:
        """The multiply-accumulates of a token's key and value."""
        return self.shape.kv + self.shape.expand_kv * (self.phase == "prefill")

    def importance(self, site: str) -> Tensor:
        """Return the importance [C] of a site's input channels: the sum over outputs of sensitivity * weight^2."""
        if site not in self._importance:
            open_unit(self.block)
            weights = [values_of(linear) for linear in self.linears(site)]
            places = [self.seen(name) for name in self.record.linears(site)]
            parts = [p.sensitivity @ w.pow(2) for p, w in zip(places, weights, strict=True)]
            self._importance[site] = reduce(torch.add, parts)
        return self._importance[site]

    def outputs(self, site: str) -> int:
        """Return the multiply-accumulates of one channel of a site: one for each output of its linear layers."""
        return sum(shape_of(linear)[0] for linear in self.linears(site))

    def skipping(
        self, spec: RouterSpec, branch: str, read: Observed, skipped: Observed, saved: float, scale: float = 1.0
    ) -> Choice:
        """Fit the substitute of a branch's token or layer router, if there is one, and return the router's choice.

        read: observations of the router's input. skipped: observations of the output that a closed gate leaves out.
        saved: multiply-accumulates that a closed gate saves. scale: ratio of that output to the substitute's output
        (the model's residual scale).
        """
        x, missing, wrapper = read.x, skipped.y, self.branch(branch)
        if spec.kind in wrapper.substitutes:
            substitute = wrapper.substitutes[spec.kind]
            assert isinstance(substitute, Substitute)
            fit_substitute(substitute, moments(x, missing / scale) if skipped.moments is None else skipped.moments)
            saved -= substitute.macs()
            missing = missing - scale * substitute(x)
        cost = (missing.pow(2) @ skipped.sensitivity / 2).unsqueeze(-1)
        router = self.router(branch, spec.kind)
        return gated_choice(router, self._features(x), cost, saved / self.dense, keeps_mean=True)

    def narrowing(self, spec: RouterSpec, branch: str) -> list[Choice]:
        """Return the choice of a router of heads or groups: closing one costs the sum over its channels' costs."""
        router, site = self.router(branch, spec.kind), f"{branch}_out"
        columns = self.seen(self.record.linears(site)[0]).x.pow(2) * self.importance(site) / 2
        assert router.members is not None
        cost = torch.zeros(len(columns), router.gates, device=router.members.device)
        cost.index_add_(1, router.members, columns)
        saved = self.gated(branch) / router.gates / self.dense
        return [gated_choice(router, self._features(self.seen(branch).x), cost, saved)]

    def _features(self, x: Tensor) -> Tensor:
        """Return the features that a branch's routers read: its input x [rows, D], normalised if it has no pre-norm."""
        return x if self.record.prenorm else F.rms_norm(x, x.shape[-1:])


def moments(x: Tensor, y: Tensor) -> Tensor:
    """Return the second moments for least squares of y [rows, D_out] on x [rows, D]: (x, 1)^T (x, 1, y), summed over
    rows that weigh as much less as the square of their |y| is larger, because those whose |y| is small will skip."""
    size = y.float().norm(dim=1, keepdim=True)
    least = (LEAST_SIZE * size.mean()).clamp(min=1e-12)
    xy: Tensor = torch.cat([x, torch.ones_like(x[:, :1]), y], 1).float() / (size + least)
    return xy[:, : x.shape[1] + 1].T @ xy
