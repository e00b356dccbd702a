"""Students of image models, in which all tokens attend to each other."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from students.architectures.lookup import architecture_of, trunk_of
from students.calibration.data_shard import BatchInfo, DataShard
from students.compute import ComputeModel, Phase
from students.decisions import Decisions
from students.execution.call import Flow
from students.execution.image_block import RoutedBlock
from students.execution.wrapper import Wrapper
from students.flops import flop_counter
from students.kernels.capture import Forward
from students.libraries import kept_rotary
from students.routers import Router
from students.sites import BRANCHES
from students.spec import RouterSpec
from students.student import Student

INTERPOLATES_ANYWAY = ("dinov2", "dinov2_with_registers", "dinov3_vit")
"""Model types whose forward interpolates positions without being asked to."""


@dataclass
class Features:
    """An image model's outputs for a batch."""

    logits: Tensor | None
    """Logits [B, classes]; None if the model has no classifier."""
    pooled: Tensor
    """Pooled features [B, D]: the classifier's input or, without a classifier, the model's own pooled output."""
    layers: list[Tensor]
    """Tokens [B, T, D] after each block, if requested; else empty."""


@dataclass
class Placed:
    """A router and its place in the model."""

    router: Router
    block: int
    branch: str
    """"attn", "mlp", or "" for a router of the whole block."""

    @property
    def key(self) -> str:
        """Key of the router's decisions (see `Decisions`)."""
        return self.router.spec.of_kind.key(self.block, self.branch)


class ImageStudent(Student):
    """A frozen image model and its routers."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._at: dict[tuple[int, int], tuple[int, ComputeModel]] = {}
        self.runtime.restores = not reads_prefix_only(self.model)
        trunk_of(self.model).register_forward_pre_hook(self._before, with_kwargs=True)
        trunk_of(self.model).register_forward_hook(self._leave, always_call=True)
        self._recorded = recorded_pass(self.model, tokens_of(self.model), self._recorded_for)
        self.tokens, self.compute = self.at(image_shape(self.model)[1:])
        """Number of tokens, prefix included, and compute model of an image of the size that the model is configured
        for; for other sizes see `at`."""
        self.runtime.own_multiple = 32 if self.tokens >= 6 * 32 else 4

    def predict(self, pixel_values: Tensor) -> Any:
        """Return the model's own output, without gradients, through recorded passes (kernels/capture.py): on GPUs, and
        on CPUs for few images. For many batches of few shapes."""
        with self._turn:
            out = self._recorded(pixel_values)
            return tree_map_only(Tensor, Tensor.clone, out)  # the next call overwrites it

    def _recorded_for(self, pixel_values: Tensor) -> Any:
        """Return the state that a recorded pass depends on besides shapes. Raises ValueError if the pass cannot be
        recorded, as when shapes inside depend on the images."""
        run = self.runtime
        if run.bypass:
            return "teacher", self._frozen.data_ptr(), self._layouts
        if not self._settled or run.execution != "skip":
            raise ValueError("how many patches pass depends on the images, or differs between them")
        self._enter(0, len(pixel_values), pixel_values.device)
        levels = tuple(p.router.levels._version for p in self.routers() if p.router.levels is not None)
        return self._layouts, self._choices, run.offset, run.capacity, run.multiples, levels

    @property
    def _settled(self) -> bool:
        """Whether the number of tokens that pass is the same for all images, whatever they show."""
        return all(map(has_fixed_shapes, self.spec.routers)) and not isinstance(self.runtime.offset, tuple)

    @torch.no_grad()
    def at(self, size: Sequence[int]) -> tuple[int, ComputeModel]:
        """Return the number of tokens, prefix included, and the compute model for images of this height and width,
        counted at the first call. Raises ValueError if the model cannot take such images."""
        height, width = size
        if (height, width) not in self._at:
            parameter = next(self.model.parameters())
            pixels = parameter.new_zeros(1, image_shape(self.model)[0], height, width)
            seen: list[int] = []
            watch = self.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
            before, self.runtime.bypass = self.runtime.bypass, True
            try:
                with watch, flop_counter() as flops:
                    call(self.model, pixels)
            except (ValueError, RuntimeError, AssertionError, TypeError) as error:  # how models refuse a size
                reason = next(iter(str(error).splitlines()), type(error).__name__)
                raise ValueError(
                    f"{type(self.model).__name__} cannot take images of {height} x {width}; it is configured for "
                    f"{' x '.join(map(str, image_shape(self.model)[1:]))}: {reason}"
                ) from error
            finally:
                self.runtime.bypass = before
            blocks = replace(self.compute, outside=0)
            inside = float(blocks.dense(torch.ones(1, seen[0], dtype=torch.bool), "prefill").sum())
            outside = max(0, round(flops.get_total_flops() // 2 - inside))
            self._at[height, width] = seen[0], replace(blocks, outside=outside)
        return self._at[height, width]

    def spent(self, pixels: Tensor, decisions: Decisions) -> tuple[Tensor, Tensor]:
        """Return the multiply-accumulates [B] of the student with these decisions, and those of the frozen model [B],
        for images [B, C, H, W]."""
        tokens, compute = self.at(pixels.shape[-2:])
        valid = torch.ones(len(pixels), tokens, dtype=torch.bool, device=pixels.device)
        return compute.routed_blocks(decisions, valid, "prefill").sum(1), compute.dense(valid, "prefill").sum(1)

    @property
    def by_count(self) -> bool:
        """Whether only whole blocks have routers, and all keep quotas: an image's cost follows from `passing`."""
        return self.stepwise and all(router.of_kind.over_blocks for router in self.spec.routers)

    def passing(self, size: Sequence[int]) -> tuple[Any, ...]:
        """Return how many patches of an image of this height and width pass each block (None: all that reach it)."""
        flow, self.runtime.call.rows = Flow(self.at(size)[0]), None
        return tuple(module.count(flow) for _, _, module in self._routed if isinstance(module, RoutedBlock))

    def uniform(self, share: float, size: Sequence[int], phase: Phase) -> float:
        """Return the compute ratio for images of this height and width if every router kept this share of its gates."""
        tokens, compute = self.at(size)
        return compute.uniform(share, tokens, phase)

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> tuple[Any, Decisions]:
        """Return the model's own output and the routers' decisions. pixel_values: [B, C, H, W], preprocessed."""
        with self._deciding() as decisions:
            return call(self.model, pixel_values, **kwargs), decisions

    def features(self, pixel_values: Tensor, layers: bool = False) -> tuple[Features, Decisions]:
        """Return logits and features of images pixel_values [B, C, H, W], with tokens after every block if `layers`,
        and the routers' decisions."""
        with self._deciding() as decisions:
            return features_of(self.model, pixel_values, self.blocks if layers else ()), decisions

    def checkpoint_blocks(self) -> None:
        """Recompute the activations of blocks with layer routers in backward instead of keeping them."""
        if self.spec.over_blocks is None:
            raise ValueError("train.checkpointing: image models recompute blocks with layer routers; there are none")
        self.runtime.recompute = True

    @property
    def shortens(self) -> bool:
        """Whether tokens that a block drops are missing in all later blocks, too."""
        over_blocks = self.spec.over_blocks
        return over_blocks is not None and over_blocks.dropped != "return"

    @cached_property
    def _routed(self) -> list[tuple[int, str, Wrapper]]:
        """Block, branch and module of everything that may hold routers: recorded passes ask for these at every call."""
        found = []
        for number, block in enumerate(self.blocks):
            places = [("", block), *((b, block.get_submodule(getattr(self.record, b))) for b in BRANCHES)]
            found += [(number, branch, module) for branch, module in places if isinstance(module, Wrapper)]
        return found

    def routers(self) -> Iterator[Placed]:
        """Yield the routers that score tokens, heads or groups, block by block."""
        for number, branch, module in self._routed:
            for router in module.routers.values():
                if isinstance(router, Router):
                    yield Placed(router, number, branch)

    @torch.no_grad()
    def set_quotas(self, batches: Sequence[Tensor], offset: float = 0.0, shard: DataShard | None = None) -> None:
        """Set every router's quota to the shares that its threshold keeps of these images, for any offset.

        offset: the dial's setting for this pass, which determines what reaches later blocks. shard: this process's
        shard, which the batches are (None: a single process's).
        """
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
        """Start a forward pass (a hook, so that it works whoever calls the model): begin a call of the runtime."""
        pixels = args[0] if args else kwargs["pixel_values"]
        if self.runtime.bypass:
            self._pack_for(len(pixels))
        else:
            self._enter(0, len(pixels), pixels.device)
            self._lengths.begin(self.runtime.call.skipping and not self._settled)


def _pooled(shard: DataShard, info: BatchInfo, x: Tensor) -> Tensor:
    """Return x [n] gathered from all processes that run this batch together, as `Runtime.pool` does."""
    return shard.all_gather([info.counted(x)])


def has_fixed_shapes(router: RouterSpec) -> bool:
    """Return whether no shape depends on the images because of this router.

    This holds for routers of tokens whose number is fixed (by quota or top-k), and for routers of heads, groups and
    channels that are masked (token granularity) or the same for all images (static).
    """
    if router.of_kind.over_tokens:
        return router.selection != "threshold"
    return router.network == "static" or router.granularity == "token"


def call(model: nn.Module, pixel_values: Tensor, **kwargs: Any) -> Any:
    """Run an image model's forward, with positions interpolated if images have another size than it is configured for.
    ViT-MAE, which shuffles patches at random, gets noise that keeps them in order."""
    if not isinstance(model, PreTrainedModel):
        with kept_rotary(model):
            return model(pixel_values, **kwargs)
    height, width = pixel_values.shape[-2:]
    if (height, width) != image_shape(model)[1:] and model.config.model_type not in INTERPOLATES_ANYWAY:
        kwargs["interpolate_pos_encoding"] = True
    if model.config.model_type == "vit_mae":
        down, across = _pair(model.config.patch_size)
        patches = (height // down) * (width // across)
        kwargs["noise"] = torch.arange(patches, device=pixel_values.device).expand(len(pixel_values), -1)
    return model(pixel_values=pixel_values, **kwargs)


def recorded_pass(
    model: nn.Module,
    tokens: int,
    state: Callable[[Tensor], Hashable] = lambda pixels: None,
    has_hooks: bool = False,
) -> Forward:
    """Return the forward pass of an image model through recordings; tokens: of an image of the size that the model is
    configured for; state: as in Forward; has_hooks: whether hooks are part of the model, and recorded with it."""
    _, height, width = image_shape(model)
    density = tokens / (height * width)
    watched = None if has_hooks else model
    return Forward(partial(call, model), state, tokens=lambda pixels: density * pixels[:, 0].numel(), model=watched)


def image_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (channels, height, width) of the images that a model is configured for."""
    if isinstance(model, PreTrainedModel):
        return model.config.num_channels, *_pair(model.config.image_size)
    patches: Any = model.patch_embed
    first = next(m for m in patches.modules() if isinstance(m, nn.Conv2d))  # in hybrid models, one of the backbone
    return first.in_channels, *patches.img_size


def tokens_of(model: nn.Module) -> int:
    """Return the number of tokens, prefix included, of an image of the size that a model is configured for."""
    prefix, patches = architecture_of(model)[0].prefix, getattr(model, "patch_embed", model)
    size: Any = (model.config if isinstance(model, PreTrainedModel) else patches).patch_size
    (_, height, width), (down, across) = image_shape(model), _pair(size)
    return (height // down) * (width // across) + (prefix or 0)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def features_of(model: nn.Module, pixel_values: Tensor, blocks: Sequence[nn.Module] = ()) -> Features:
    """Return logits and features of images pixel_values [B, C, H, W], and the tokens after these blocks."""
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
    """Return whether a model's output depends on its prefix tokens only: it classifies by the class token and returns
    nothing else, so the final states of patches are not needed."""
    if isinstance(model, PreTrainedModel):
        return False  # transformers' models return hidden states on request
    return model.global_pool == "token" and bool(model.num_prefix_tokens)


def classifier_of(model: nn.Module) -> nn.Module | None:
    """Return the module that maps pooled features to logits, or None."""
    names = ("classifier", "cls_classifier") if isinstance(model, PreTrainedModel) else ("head",)
    return next((getattr(model, name) for name in names if hasattr(model, name)), None)
