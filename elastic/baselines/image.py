"""Untrained baselines for image students, on the same frozen weights: content-blind dropping, and merging, of patches.

random, uniform: every block drops the same number of patches of every image, the mean number that the student's router
drops there; the patches are drawn at random, or evenly spaced.
tome: every block merges a few patches with similar ones (arXiv 2210.09461).
"""

from __future__ import annotations

import bisect
import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn

from students.execution.image_block import RoutedBlock
from students.families.image import ImageStudent
from students.families.vision_language import VisionLanguageStudent
from students.flops import flop_counter
from students.kernels.key_bias import key_mask
from students.routers import Router


class _FixedScores(nn.Module):
    """A replacement for a router: scores independent of the tokens' content, and a fixed share of tokens kept.

    whole: the number of tokens of an image before any is dropped, if dropped tokens are missing from all later blocks
    (otherwise 0). With fewer tokens than that all scores are infinite; the block takes the minimum over blocks, so that
    the scores of the first block stay in force.
    """

    def __init__(
        self, router: Router, share: Callable[[float], float], scores: Callable[[Tensor], Tensor], whole: int = 0
    ) -> None:
        super().__init__()
        self.spec = dataclasses.replace(router.spec, selection="quota", multiple=1)
        self.quota = share
        self.shift = router.shift
        self.whole = whole
        self.scores = scores

    def of_prompt(self, x: Tensor, question: Tensor) -> Tensor:
        """Return scores [B, T] of embedded tokens x [B, T, D]."""
        return self.scores(x)

    def macs(self, width: int) -> int:
        """Return 0: the scores take no multiply-accumulates."""
        return 0

    def of_stream(self, x: Tensor, distance: Tensor | None = None) -> Tensor:
        """Return scores [B, n] of tokens x [B, n, D] of the residual stream."""
        if x.shape[1] < self.whole:
            return x.new_full(x.shape[:2], torch.inf, dtype=torch.float32)
        return self.scores(x)


def _constant(share: float, offset: float) -> float:
    return share


@contextmanager
def dropping_patches(
    student: ImageStudent, kind: str, batches: Iterable[Tensor], seed: int = 0
) -> Iterator[ImageStudent]:
    """Within this context every block of the student drops as many patches as its router did on average over batches
    of pixels [B, C, H, W], but drawn at random (kind "random") or evenly spaced ("uniform").

    ValueError if the student has no layer routers with `selection` "quota" or "threshold".
    """
    layer = student.spec.over_blocks
    if layer is None or layer.selection == "topk":
        raise ValueError(
            f"the baseline {kind} drops as many patches as layer routers with `selection: quota` or threshold: this "
            "run has none"
        )
    scores, whole, shares = _scores_without_content(kind, seed), 0, []
    with torch.no_grad():
        for pixels in batches:
            shares.append(student(pixels)[1].share)
            whole = student.at(pixels.shape[-2:])[0] if student.shortens else 0
    before = []
    for block in student.blocks:
        if isinstance(block, RoutedBlock) and block.router is not None:
            name, router = block.router.spec.kind, block.router
            here = torch.cat([share[block.key] for share in shares])
            kept = float(here[:, student.runtime.prefix :].mean())
            before.append((block, name, router, block.merges))
            block.routers[name] = _FixedScores(router, partial(_constant, kept), scores, whole)
            block.merges = False
    try:
        yield student
    finally:
        for block, name, router, merges in before:
            block.routers[name], block.merges = router, merges


@contextmanager
def keeping_image_tokens(student: VisionLanguageStudent, kind: str, seed: int = 0) -> Iterator[VisionLanguageStudent]:
    """Within this context the student keeps as many image tokens as before, but drawn at random (kind "random") or
    evenly spaced ("uniform").

    ValueError if the student has no image router with `selection` "quota".
    """
    if student.image_router is None or student.image_router.spec.selection != "quota":
        raise ValueError(f"the baseline {kind} keeps as many tokens as an image router with quota: this run has none")
    router = student.image_router
    student.replace_image_router(_FixedScores(router, router.quota, _scores_without_content(kind, seed)))
    try:
        yield student
    finally:
        student.replace_image_router(router)


def _scores_without_content(kind: str, seed: int) -> Callable[[Tensor], Tensor]:
    """Return a function from tokens [B, n, D] to scores [B, n] independent of their content; kind: "random", or
    "uniform" (see `spread`)."""
    generator = torch.Generator().manual_seed(seed)

    def at_random(x: Tensor) -> Tensor:
        return torch.rand(x.shape[:2], generator=generator).to(x.device)

    def evenly(x: Tensor) -> Tensor:
        return spread(x.shape[1]).to(x.device).repeat(len(x), 1)

    return at_random if kind == "random" else evenly


def spread(count: int) -> Tensor:
    """Return scores [count] of consecutive positions such that, for every k, the k highest are about evenly spaced (van
    der Corput sequence)."""
    bits = max(1, (count - 1).bit_length())
    reverse = [int(f"{n:0{bits}b}"[::-1], 2) for n in range(count)]
    return -torch.tensor(reverse, dtype=torch.float32)


class MergingBlock(nn.Module):
    """A timm block that merges `pairs` pairs of similar patches between attention and MLP, as ToMe (arXiv 2210.09461).

    state: shared by the blocks of a model; its "size" is how many patches each token stands for [B, n, 1], or None if
    no tokens have been merged yet.
    """

    def __init__(self, block: Any, prefix: int, state: dict[str, Tensor | None]) -> None:
        super().__init__()
        self.block = block
        self.pairs = 0
        self.prefix = prefix
        self.state = state
        self._keys = torch.empty(0)
        block.attn.qkv.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Forward hook of the qkv layer that stores the keys averaged over heads [B, n, head size], the metric by which
        ToMe compares tokens."""
        _, keys, _ = rearrange(out, "batch token (qkv channel) -> qkv batch token channel", qkv=3)
        heads = self.block.attn.num_heads
        self._keys = reduce(keys, "batch token (head size) -> batch token size", "mean", head=heads)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, n, D] -> [B, n - pairs, D]."""
        block, size = self.block, self.state["size"]
        mask = None if size is None else key_mask(size.squeeze(-1), x.dtype)
        x = x + block.ls1(block.attn(block.norm1(x), attn_mask=mask))
        if self.pairs:
            x, self.state["size"] = merge(x, self._keys, size, self.pairs, self.prefix)
        return x + block.ls2(block.mlp(block.norm2(x)))


def merge(x: Tensor, metric: Tensor, size: Tensor | None, pairs: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge tokens by bipartite soft matching (arXiv 2210.09461) and return (tokens [B, n - pairs, D], their sizes).

    Each token at an even position is matched with the most similar token at an odd position, by cosine similarity of
    `metric` [B, n, C]. The `pairs` most similar matches are merged into one token each, the mean weighted by `size`
    [B, n, 1], the number of patches that a token stands for (None: 1 each). The first `prefix` tokens are never merged.
    """
    size = x.new_ones(*x.shape[:2], 1) if size is None else size
    if x.shape[1] - prefix < 2:
        return x, size
    first, patches = x[:, :prefix], x[:, prefix:]
    weights = size[:, prefix:]
    unit = nn.functional.normalize(metric[:, prefix:], dim=-1)
    a, b = unit[:, ::2], unit[:, 1::2]
    pairs = min(pairs, b.shape[1])
    best, partner = (a @ b.transpose(1, 2)).max(-1)
    order = best.argsort(dim=1, descending=True)
    going, staying = order[:, :pairs, None], order[:, pairs:, None]
    target = partner.gather(1, order[:, :pairs]).unsqueeze(-1)

    def split(values: Tensor) -> Tensor:
        source, kept = values[:, ::2], values[:, 1::2]
        width = values.shape[-1]
        moved = source.gather(1, going.expand(-1, -1, width))
        kept = kept.scatter_add(1, target.expand(-1, -1, width), moved)
        return torch.cat([source.gather(1, staying.expand(-1, -1, width)), kept], 1)

    total = split(weights)
    return torch.cat([first, split(patches * weights) / total], 1), torch.cat([size[:, :prefix], total], 1)


def merging(model: nn.Module, pixels: Tensor, target: float) -> tuple[nn.Module, float]:
    """Return (copy of a timm model on the same weights that merges patches, its share of the model's FLOPs).

    All blocks merge the same number of pairs, up to rounding: the smallest number at which the share of FLOPs is at
    most `target`. pixels: an image on which FLOPs are counted. ValueError if the model is not a timm VisionTransformer,
    or if no number of merges reaches the target.
    """
    blocks = getattr(model, "blocks", None)
    if blocks is None or not all(hasattr(b, "ls1") and hasattr(b.attn, "qkv") for b in blocks):
        raise ValueError("the baseline tome is for timm's VisionTransformer")
    dense = _flops(model, pixels)
    merged: Any = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    state: dict[str, Tensor | None] = {}
    merged.register_forward_pre_hook(lambda module, args: state.update(size=None))
    for number, block in enumerate(merged.blocks):
        merged.blocks[number] = MergingBlock(block, merged.num_prefix_tokens, state)

    def share(total: int) -> float:
        """Spread this total number of merges over the blocks and return the resulting share of the FLOPs."""
        for number, block in enumerate(merged.blocks):
            block.pairs = total * (number + 1) // len(blocks) - total * number // len(blocks)
        return _flops(merged, pixels) / dense

    most = len(blocks) * pixels.shape[-1]
    total = bisect.bisect_left(range(most), -target, key=lambda total: -share(total))
    if (reached := share(total)) > target:
        raise ValueError(f"merging cannot bring this model to {target} of its compute, only to {reached:.3f}")
    return merged, reached


@torch.no_grad()
def _flops(model: nn.Module, pixels: Tensor) -> int:
    with flop_counter() as counter:
        model(pixels)
    return counter.get_total_flops()
