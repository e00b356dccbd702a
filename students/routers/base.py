"""Routers that compute scores of gates from the input of their branch, and the base class of all added modules."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from students.kernels.merging import per_size, stream_score
from students.prepared import InPrecision, Stamp
from students.routers import selection
from students.spec import RouterSpec

LEVELS = 65
"""Number of quantiles that represent the score distribution of a router with quota."""


class Added(nn.Module):
    """A module that is added to a model: its parameters stay float32 if the model is converted to another dtype."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def convert(x: Tensor) -> Tensor:
            out = fn(x)
            return out if out.dtype == x.dtype else x.to(out.device)

        return super()._apply(convert, recurse)  # type: ignore[no-untyped-call]


class ThinLinear(nn.Linear):
    """A linear layer with float32 parameters that computes in its input's dtype: for many tokens, copying the input to
    float32 costs more than the router itself."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        super().__init__(inputs, outputs, bias)
        self._precise = InPrecision()

    def forward(self, x: Tensor) -> Tensor:
        if self.out_features > 1:
            return F.linear(x, *self._parameters_in(x.dtype))
        product, *bias = self.parts(x)
        return product + bias[0] if bias else product

    def parts(self, x: Tensor) -> list[Tensor]:
        """Return the product [..., 1] of a layer with one output, and then the bias [1] if the layer has one."""
        weight, *bias = self._parameters_in(x.dtype)
        return [(x @ weight[0]).unsqueeze(-1), *bias]  # faster than with a matrix of one row

    def _parameters_in(self, dtype: torch.dtype) -> list[Tensor]:
        return self._precise(dtype, self.weight, *([] if self.bias is None else [self.bias]))


class Router(Added):
    """Computes scores of `gates` gates from a branch's input. Scores are zero at the start; a gate is open where its
    score plus what the dial adds (`shift`) is >= 0.

    width: of the input. members: see the buffer. gains: whether a gain is learned (see StudentSpec).
    """

    members: Tensor | None
    """Index [C] of the gate that each channel in front of the branch's last linear layer belongs to (head and expert
    routers); None for other kinds."""
    levels: Tensor | None
    """Quantiles [LEVELS] of the scores on training images, ascending (`selection: quota`); None for other routers."""

    def __init__(
        self, spec: RouterSpec, width: int, gates: int, members: Tensor | None = None, gains: bool = False
    ) -> None:
        super().__init__()
        self.spec = spec
        self.gates = gates
        by_token = spec.of_kind.over_tokens and spec.granularity == "token" and not spec.prefix
        plain = spec.selection == "threshold" and spec.network == "linear" and spec.weight == "none"
        self.only_compares = by_token and plain and not gains
        """Whether all that is asked of the router is for which tokens a linear score reaches one limit."""
        self._joined: dict[tuple[torch.dtype, int], tuple[Tensor, Tensor, Tensor | None]] = {}
        self.register_buffer("members", members)
        self.register_buffer("levels", torch.zeros(LEVELS) if spec.selection == "quota" else None)
        self._quota, self._stamp = 0.0, Stamp()
        self._stands, self._stood = True, Stamp()
        self.log_gain = nn.Parameter(torch.zeros(())) if gains else None
        self.distance_weight = nn.Parameter(torch.zeros(())) if spec.dropped == "merge" else None
        if spec.network == "static":
            self.score = nn.Parameter(torch.zeros(gates))
            return
        self.linear = ThinLinear(width, gates)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        if spec.network == "mlp":
            last = ThinLinear(spec.hidden, gates, bias=False)
            self.mlp = nn.Sequential(ThinLinear(width, spec.hidden), nn.GELU(), last)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Return float32 scores [B, T, N] (static: [1, 1, N]) for the branch's input x [B, T, D]."""
        if self.spec.network == "static":
            return self.score.clone()[None, None]  # a view would require a gradient even under no_grad
        score: Tensor = self.linear(x)
        if self.spec.network == "mlp":
            score = score + self.mlp(x)
        return score.float()

    def joined(
        self, dtype: torch.dtype, beside: Tensor | None = None, unit: int = 1
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what `ops.open_tokens` reads: weight, bias and up of the layers that read the input, as one layer in
        this dtype. They are kept until `separate`, because recorded steps read them (recording/step.py).

        beside [r, D]: weight of another layer, without a bias, that reads the same input; its outputs come first, and
        zeros behind all others make the number of outputs a multiple of `unit`."""
        if (dtype, unit) not in self._joined:
            with torch.inference_mode(False), torch.no_grad():
                self._joined[dtype, unit] = self._join(dtype, beside, unit)
        return self._joined[dtype, unit]

    def _join(self, dtype: torch.dtype, beside: Tensor | None, unit: int) -> tuple[Tensor, Tensor, Tensor | None]:
        names, up = ["linear"], None
        if self.spec.network == "mlp":
            names, up = ["linear", "mlp.0"], self.get_parameter("mlp.2.weight")[0].to(dtype)
        weight, bias = (torch.cat([self.get_parameter(f"{x}.{part}") for x in names]) for part in ("weight", "bias"))
        first = 0 if beside is None else len(beside)
        weight = weight if beside is None else torch.cat([beside, weight])
        behind = -len(weight) % unit
        return F.pad(weight, (0, 0, 0, behind)).to(dtype), F.pad(bias, (first, behind)).to(dtype), up

    def separate(self) -> None:
        """Drop what `joined` has kept, as where a parameter has changed."""
        self._joined.clear()

    def of_stream(self, x: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return scores [B, T] of tokens x [B, T, D] of the residual stream, each divided by its root mean square.

        distance [B, T]: if tokens merge, the distance of each token to the token that it would merge into.
        """
        if self.spec.network == "mlp":
            score: Tensor = self(x * per_size(x).unsqueeze(-1).to(x.dtype)).squeeze(-1)
        else:
            score = stream_score(x, self.linear.weight[0], self.linear.bias)
        return score if distance is None or self.distance_weight is None else score + self.distance_weight * distance

    @property
    def of_channel(self) -> Tensor:
        """`members` of a head or expert router, which always has them."""
        assert self.members is not None, "its gates are among no channels"
        return self.members

    def share(self, gate: Tensor) -> Tensor:
        """Return the share [...] of channels whose gate [..., N] is open; groups may differ in size by one."""
        if self.members is None or len(self.members) % self.gates == 0:
            return gate.mean(-1)
        sizes: Tensor = self.members.bincount(minlength=self.gates) / len(self.members)
        return gate @ sizes

    def shift(self, dial: float | Tensor) -> float | Tensor:
        """Return what is added to the scores at this offset of the dial: gain * offset."""
        return dial if self.log_gain is None else self.log_gain.exp() * dial

    @torch.no_grad()
    def open_by(self, offset: float) -> None:
        """Add permanently to all scores what the dial would add at this offset; for routers with a linear map."""
        rise = self.shift(offset)
        for raised in (self.linear.bias, self.levels):
            if raised is not None:
                raised.add_(rise)

    def stands(self, raised: Tensor, offset: float) -> bool:
        """Return whether the single gate of a static router is open, given `raised`, its score with the shift at this
        offset. The host waits for the device once for each value of score, gain and offset."""
        if self._stood.renew([x for x in (self.score, self.log_gain) if x is not None], offset):
            self._stands = bool((raised >= 0).all())
        return self._stands

    def set_quota(self, scores: Tensor) -> None:
        """Store the distribution of scores [N], from which `quota` computes shares."""
        assert self.levels is not None, "only a router with quota has levels"
        steps = torch.linspace(0, 1, LEVELS, device=scores.device)
        self.levels.copy_(torch.quantile(scores.float().flatten(), steps))

    def quota(self, offset: float) -> float:
        """Return the share of the stored distribution's scores that are open at this offset, between 0 and 1."""
        assert self.levels is not None, "only a router with quota has levels"
        if self._stamp.renew([x for x in (self.levels, self.log_gain) if x is not None], offset):
            with torch.no_grad():
                self._quota = self._quota_at(float(self.shift(offset)), self.levels.tolist())
        return self._quota

    @staticmethod
    def _quota_at(offset: float, levels: list[float]) -> float:
        """Return the share of scores >= -offset, interpolated linearly between the quantiles `levels`."""
        place = bisect.bisect_left(levels, -offset)
        if place == 0 or place == len(levels):
            return 0.0 if place else 1.0
        low, high = levels[place - 1], levels[place]
        return 1 - (place - 1 + (-offset - low) / (high - low)) / (len(levels) - 1)

    def macs(self, width: int) -> int:
        """Return the multiply-accumulates for one token."""
        if self.spec.network == "static":
            return 0
        mlp = self.spec.hidden * (width + self.gates) if self.spec.network == "mlp" else 0
        return width * self.gates + mlp


class ImageRouter(Router):
    """Scores image tokens in front of a language model: from the token alone and, with `query`, from a bilinear form of
    rank `query` of the token and the prompt's mean text token."""

    def __init__(self, spec: RouterSpec, width: int, gains: bool = False) -> None:
        super().__init__(spec, width, 1, gains=gains)
        if spec.query:
            self.look = ThinLinear(width, spec.query, bias=False)
            self.ask = ThinLinear(width, spec.query, bias=False)
            nn.init.zeros_(self.ask.weight)

    def of_prompt(self, x: Tensor, question: Tensor) -> Tensor:
        """Return scores [B, T] of embedded tokens x [B, T, D]; question [B, T] bool: which are the prompt's text."""
        score = self.of_stream(x)
        if self.spec.query:
            unit = F.rms_norm(x, x.shape[-1:])
            asked = self.ask(selection.prompt_mean(unit, question))
            score = score + (self.look(unit) * asked).sum(-1).float() / self.spec.query**0.5
        return score

    def macs(self, width: int) -> int:
        """Return the multiply-accumulates for one token."""
        return super().macs(width) + self.spec.query * (width + 1)
