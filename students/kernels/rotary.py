"""Rotary embeddings (arXiv 2104.09864) of queries and keys in one pass, in place of a model's own function.

The function in transformers is ten operators a block, nearly half of the launches of a decode step on a GPU, and
sixteen in backward. It is replaced while a model runs, where there is a kernel and a trial shows that the bits are the
same; on CPUs, which have no kernel for backward, only where no gradient is needed.
"""

from __future__ import annotations

import sys
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from students.kernels import autograd, devices, ops

NAME = "apply_rotary_pos_emb"
"""Name of the function in transformers, in each module that defines an attention class."""


class Rotary:
    """Replaces a model's function (query [B, H, T, d], key [B, K, T, d], cos, sin [B or 1, T, r]) -> (query, key), or,
    as in Gemma 4, (x [B, T, H, d], cos, sin, unsqueeze_dim=2) -> x."""

    def __init__(self, plain: Any) -> None:
        self.plain = plain
        self.turns_one = "x" in signature(plain).parameters
        self._same: dict[Any, bool] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given, usual = args, len(args) == 4 and not kwargs
        if self.turns_one and len(args) == 3:
            x, usual = args[0].transpose(1, 2), kwargs == {"unsqueeze_dim": 2}
            given = x, x[:, :0], *args[1:]
        if not usual or torch.compiler.is_compiling() or not self._fits(*given):
            return self.plain(*args, **kwargs)
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
        turned = (autograd.rotary if learns else ops.rotary)(*given)
        return turned[0].transpose(1, 2) if self.turns_one else turned

    def _fits(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
        if torch.is_grad_enabled():
            learns = query.requires_grad or key.requires_grad
            if cos.requires_grad or sin.requires_grad or (learns and not devices.runs_ahead(query.device)):
                return False
        if not ops.compiled(query) or not query.dtype == key.dtype == cos.dtype == sin.dtype:
            return False
        if cos.shape != sin.shape or cos.shape[-2] != query.shape[-2] or cos.shape[0] not in (1, len(query)):
            return False  # the model's function broadcasts or refuses them; the kernel would read what is not theirs
        about = query.dtype, query.device, query.shape[-1], cos.shape[-1], query.ndim, cos.ndim
        if about not in self._same:
            if query.is_cuda and torch.cuda.is_current_stream_capturing():
                return False
            self._same[about] = query.ndim == 4 and cos.ndim == 3 and self._agrees(query, cos)
        return self._same[about]

    @torch.no_grad()
    def _agrees(self, query: Tensor, cos: Tensor) -> bool:
        """Return whether the kernel and the model's function give the same bits on random numbers."""
        draw = torch.Generator().manual_seed(0)

        def make(*shape: int) -> Tensor:
            return torch.randn(shape, generator=draw).to(query.device, query.dtype)

        size, width = query.shape[-1], cos.shape[-1]
        if width % 2 or width > size:
            return False
        some = make(2, 9, 3, size).transpose(1, 2), make(2, 9, 1, size).transpose(1, 2), make(2, 9, width)
        given = query, key, *angles = *some, make(2, 9, width)
        plain = [self.plain(x, *angles) for x in (query, key)] if self.turns_one else self.plain(*given)
        return all(map(torch.equal, ops.rotary(*given), plain))


@cache
def _at_once(plain: Any) -> Rotary:
    return Rotary(plain)


class Rotations:
    """From `begin` to `end`, models whose code is in the same Python module as that of `trunk` rotate in one pass."""

    def __init__(self, trunk: nn.Module) -> None:
        self._where = type(trunk).__module__
        self._before: list[Any] = []

    def begin(self) -> None:
        """Replace the model's function; calls may be nested."""
        if torch.compiler.is_compiling():
            return
        namespace = vars(sys.modules[self._where])
        before = namespace.get(NAME)
        self._before.append(before)
        if before is not None and not isinstance(before, Rotary):
            namespace[NAME] = _at_once(before)

    def end(self) -> None:
        """Restore the function that was in place at the matching `begin`."""
        if torch.compiler.is_compiling() or not self._before:
            return
        before = self._before.pop()
        if before is not None:
            vars(sys.modules[self._where])[NAME] = before
