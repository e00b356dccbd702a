"""Students of image models, whose tokens see each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from students.architectures import BRANCHES, architecture_of, trunk_of
from students.calibration.data_shard import BatchInfo, DataShard
from students.compute import ComputeModel, Phase
from students.decisions import Decisions
from students.execution.capture import Forward
from students.execution.wrapper import Wrapper
from students.flops import flop_counter
from students.routers import Router
from students.spec import RouterSpec
from students.student import Student

INTERPOLATES_ANYWAY = ("dinov2", "dinov2_with_registers")
"""Kinds of models whose forward interpolates positions without being asked to."""


@dataclass
class Features:
    """What an image model made of a batch."""

    logits: Tensor | None
    """[B, classes]; None where the model has no classifier."""
    pooled: Tensor
    """[B, D]: what the classifier reads, or the model's own summary of the image."""
    layers: list[Tensor]
    """Tokens [B, T, D] after each block, if they were asked for."""


@dataclass
class Placed:
    """A router and where it stands."""

    router: Router
    block: int
    branch: str
    """"attn", "mlp", or "" for the whole block's."""

    @property
    def key(self) -> str:
        """Of its decisions."""
        return self.router.spec.of_kind.key(self.block, self.branch)


class ImageStudent(Student):
    """A frozen image model and its routers."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._at: dict[tuple[int, int], tuple[int, ComputeModel]] = {}
        self.runtime.restores = not reads_prefix_only(self.model)
        trunk_of(self.model).register_forward_pre_hook(self._before, with_kwargs=True)
        trunk_of(self.model).register_forward_hook(self._leave, always_call=True)
        self._recorded = Forward(partial(call, self.model), self._recorded_for)
        self.tokens, self.compute = self.at(image_shape(self.model)[1:])
        """Of an image of the size that the model is configured for: how many tokens it has, those of the prefix
        included, and what they cost. `at` has those of other sizes."""

    def predict(self, pixel_values: Tensor) -> Any:
        """The model's own output, without gradients; on GPUs through recorded passes (execution/capture.py), which the
        next call overwrites. For many batches of few shapes."""
        return self._recorded(pixel_values)

    def _recorded_for(self, pixel_values: Tensor) -> Any:
        """What a recorded pass depends on besides shapes; ValueError where it would depend on the images."""
        run = self.runtime
        if run.bypass:
            return "teacher", self._frozen.data_ptr(), self._layouts
        if not self._settled or run.execution != "skip":
            raise ValueError("how many patches pass depends on the images, or differs between them")
        self._enter(0, len(pixel_values), pixel_values.device)
        levels = tuple(p.router.levels._version for p in self.routers() if p.router.levels is not None)
        return self._layouts, run.offset, run.capacity, run.multiples, levels

    @property
    def _settled(self) -> bool:
        """Whether images have no say in how many of their tokens pass, and all have as many."""
        return all(map(has_fixed_shapes, self.spec.routers)) and not isinstance(self.runtime.offset, tuple)

    @torch.no_grad()
    def at(self, size: Sequence[int]) -> tuple[int, ComputeModel]:
        """(tokens, those of the prefix included; what they cost) of images of this height and width, counted when it is
        first asked for. ValueError where the model cannot take such images."""
        height, width = size
        if (height, width) not in self._at:
            parameter = next(self.model.parameters())
            pixels = parameter.new_zeros(1, image_shape(self.model)[0], height, width)
            seen: list[int] = []
            hook = self.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
            before, self.runtime.bypass = self.runtime.bypass, True
            try:
                with flop_counter() as flops:
                    call(self.model, pixels)
            except (ValueError, RuntimeError, AssertionError, TypeError) as error:  # what models refuse a size by
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(
                    f"{type(self.model).__name__} cannot take images of {height} x {width}; it is configured for "
                    f"{' x '.join(map(str, image_shape(self.model)[1:]))}: {reason}"
                ) from error
            finally:
                hook.remove()
                self.runtime.bypass = before
            blocks = replace(self.compute, outside=0)
            inside = float(blocks.dense(torch.ones(1, seen[0], dtype=torch.bool), "prefill").sum())
            outside = max(0, round(flops.get_total_flops() // 2 - inside))
            self._at[height, width] = seen[0], replace(blocks, outside=outside)
        return self._at[height, width]

    def spent(self, pixels: Tensor, decisions: Decisions) -> tuple[Tensor, Tensor]:
        """(student's, frozen model's) multiply-accumulates of each of the images [B, C, H, W] that were decided on."""
        tokens, compute = self.at(pixels.shape[-2:])
        valid = torch.ones(len(pixels), tokens, dtype=torch.bool, device=pixels.device)
        return compute.routed_blocks(decisions, valid, "prefill").sum(1), compute.dense(valid, "prefill").sum(1)

    def uniform(self, share: float, size: Sequence[int], phase: Phase) -> float:
        """The compute ratio if every router kept the same share of its gates, for images of this height and width."""
        tokens, compute = self.at(size)
        return compute.uniform(share, tokens, phase)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Any, Decisions]:
        """The model's own output, and what was decided. pixel_values [B, C, H, W], preprocessed."""
        with self._deciding() as decisions:
            return call(self.model, pixel_values, **kwargs), decisions

    def features(self, pixel_values: Tensor, layers: bool = False) -> tuple[Features, Decisions]:
        """Logits and features of images pixel_values [B, C, H, W]; layers: also the tokens after every block."""
        with self._deciding() as decisions:
            return features_of(self.model, pixel_values, self.blocks if layers else ()), decisions

    def checkpoint_blocks(self) -> None:
        """Compute activations of blocks with layer routers again in backward instead of keeping them."""
        if self.spec.over_blocks is None:
            raise ValueError("train.checkpointing: image models recompute blocks with layer routers; there are none")
        self.runtime.recompute = True

    @property
    def shortens(self) -> bool:
        """Whether tokens that a block drops stay away from all later ones."""
        over_blocks = self.spec.over_blocks
        return over_blocks is not None and over_blocks.dropped != "return"

    def routers(self) -> Iterator[Placed]:
        """Routers that score tokens, heads or groups, block by block."""
        for number, block in enumerate(self.blocks):
            places = [("", block), *((b, block.get_submodule(getattr(self.record, b))) for b in BRANCHES)]
            for branch, module in places:
                for router in module.routers.values() if isinstance(module, Wrapper) else ():
                    if isinstance(router, Router):
                        yield Placed(router, number, branch)

    @torch.no_grad()
    def set_quotas(self, batches: Sequence[Tensor], offset: float = 0.0, shard: DataShard | None = None) -> None:
        """Let every router with quota take, from now on, the shares that its threshold keeps of these images; offset:
        where the dial is when what reaches later blocks is looked at; shard: what other processes have of each batch
        (None: nothing)."""
        seen: dict[str, list[Tensor]] = {}
        run, shard = self.runtime, shard or DataShard()
        before = run.training, run.execution, run.offset, run.pool
        run.training, run.execution, run.offset = True, "mask", offset
        try:
            for pixels, info in shard.enumerate(batches):
                run.pool = partial(_pooled, shard, info)
                _, decisions = self(pixels)
                for placed in self.routers():
                    if placed.router.levels is None:
                        continue
                    score = decisions.score[placed.key].squeeze(-1)
                    tail = score if placed.router.spec.of_kind.over_blocks else score[:, run.prefix :]
                    seen.setdefault(placed.key, []).append(info.counted(tail.flatten()))
        finally:
            run.training, run.execution, run.offset, run.pool = before
        for placed in self.routers():
            if placed.router.levels is not None:
                placed.router.set_quota(shard.all_gather(seen[placed.key]))

    def _before(self, trunk: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """What routers need to know of a forward pass, whoever called the model."""
        pixels = args[0] if args else kwargs["pixel_values"]
        if self.runtime.bypass:
            self._pack_for(len(pixels))
        else:
            self._enter(0, len(pixels), pixels.device)
            self._lengths.begin(self.runtime.call.skipping and not self._settled)


def _pooled(shard: DataShard, info: BatchInfo, x: Tensor) -> Tensor:
    """What all processes have of something [n] in a batch that they share."""
    return shard.all_gather([info.counted(x)])


def has_fixed_shapes(router: RouterSpec) -> bool:
    """Whether a router leaves no shape to the images. Tokens: their number is settled, by quota or top-k; heads, groups
    and channels: it masks, or is the same for all."""
    if router.of_kind.over_tokens:
        return router.selection != "threshold"
    return router.network == "static" or router.granularity == "token"


def call(model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Any:
    """An image model's forward, its positions interpolated where images have another size than it is configured for.
    ViT-MAE, which would hide patches at random, sees all of them in their order."""
    if not isinstance(model, PreTrainedModel):
        return model(pixel_values, **kwargs)
    height, width = pixel_values.shape[-2:]
    if (height, width) != image_shape(model)[1:] and model.config.model_type not in INTERPOLATES_ANYWAY:
        kwargs["interpolate_pos_encoding"] = True
    if model.config.model_type == "vit_mae":
        down, across = _pair(model.config.patch_size)
        patches = (height // down) * (width // across)
        kwargs["noise"] = torch.arange(patches, device=pixel_values.device).expand(len(pixel_values), -1)
    return model(pixel_values=pixel_values, **kwargs)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """(channels, height, width) of the images that a model is configured for."""
    if isinstance(model, PreTrainedModel):
        return model.config.num_channels, *_pair(model.config.image_size)
    patches: Any = model.patch_embed
    first = next(m for m in patches.modules() if isinstance(m, nn.Conv2d))  # a hybrid's is its backbone's
    return first.in_channels, *patches.img_size


def tokens_of(model: nn.Module) -> int:
    """Tokens, those of the prefix included, of an image of the size that a model is configured for."""
    prefix, patches = architecture_of(model)[0].prefix, getattr(model, "patch_embed", model)
    size: Any = (model.config if isinstance(model, PreTrainedModel) else patches).patch_size
    (_, height, width), (down, across) = image_shape(model), _pair(size)
    return (height // down) * (width // across) + (prefix or 0)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def features_of(model: nn.Module, pixel_values: Tensor, blocks: Sequence[nn.Module] = ()) -> Features:
    """Logits and features of images pixel_values [B, C, H, W], and the tokens after these blocks."""
    seen: dict[str, Any] = {"layers": []}
    head = classifier_of(model)
    with ExitStack() as hooks:
        if head is not None:
            hook = head.register_forward_pre_hook(lambda _, args: seen.update(pooled=args[0]))
            hooks.callback(hook.remove)
        for block in blocks:
            hook = block.register_forward_hook(lambda _, args, out: seen["layers"].append(out))
            hooks.callback(hook.remove)
        out = call(model, pixel_values)
    if isinstance(out, Tensor):
        return Features(None if isinstance(head, nn.Identity) else out, seen["pooled"], seen["layers"])
    pooled = seen.get("pooled", out.get("pooler_output"))
    return Features(out.get("logits"), out.last_hidden_state.mean(1) if pooled is None else pooled, seen["layers"])


def reads_prefix_only(model: nn.Module) -> bool:
    """Whether nobody sees what a model makes of its patches: it classifies by its class token, and returns no more."""
    if isinstance(model, PreTrainedModel):
        return False  # asked for its hidden states, it returns them
    return model.global_pool == "token" and bool(model.num_prefix_tokens)


def classifier_of(model: nn.Module) -> nn.Module | None:
    """The module that turns pooled features into logits, or None."""
    names = ("classifier", "cls_classifier") if isinstance(model, PreTrainedModel) else ("head",)
    return next((getattr(model, name) for name in names if hasattr(model, name)), None)
