"""Train a small vision transformer from scratch: how the teachers were made that no registry offers.

`python -m teachers.recipe` says how to call it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 128
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1
DROPPED_PATCHES = ((0.0, 0.5), (0.5, 0.3), (0.75, 0.0))
"""(share of the run, share of the patches left out from there on): PatchDropout (arXiv 2208.07220)."""


def new_vit(size: int, channels: int, classes: int) -> nn.Module:
    """A ViT-Tiny (depth 12, width 192, 3 heads) with patches of 4 x 4 pixels, freshly initialised."""
    import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=size, patch_size=4, in_chans=channels, num_classes=classes
    )


def train_vit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    minutes: float,
    seed: int,
    report: Callable[[float, float, float], None],
) -> None:
    """Train in place on images [N, C, H, W] uint8 and labels [N] until the time is up.

    Hidden matrices by Muon (Jordan et al., 2024), everything else by AdamW; weights are kept in float32 and multiplied
    in bfloat16. report(done, loss, images a second) is called every 50 steps, done from 0 to 1.
    """
    from timm.layers import PatchDropout, set_fused_attn

    torch.manual_seed(seed)
    set_fused_attn(False)  # on CPUs the fused kernel's backward takes half of the step
    for block in model.blocks:
        block.attn.fused_attn = False
    mean, std = channel_statistics(images)
    work = model.train().to(torch.bfloat16)
    parameters = list(work.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in parameters]
    names = [name for name, _ in work.named_parameters()]
    hidden = [m for m, n in zip(masters, names, strict=True) if n.startswith("blocks.") and m.ndim == 2]
    others = [m for m, n in zip(masters, names, strict=True) if not (n.startswith("blocks.") and m.ndim == 2)]
    decayed = [m for m in others if m.ndim > 1]
    plain = [m for m in others if m.ndim <= 1]
    optimizers = [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=PEAK_LR, weight_decay=WEIGHT_DECAY
        ),
    ]
    start, step, seen, loss_sum = time.monotonic(), 0, 0, 0.0
    mark = start
    order = torch.randperm(len(images))
    while (done := (time.monotonic() - start) / (60 * minutes)) < 1:
        if (step + 1) * BATCH > len(order):
            order = torch.cat([order, torch.randperm(len(images))])
        rows = order[step * BATCH : (step + 1) * BATCH]
        dropped = next(share for begin, share in reversed(DROPPED_PATCHES) if done >= begin)
        work.patch_drop = PatchDropout(dropped, num_prefix_tokens=1) if dropped else nn.Identity()
        x = augment(normalise(images[rows], mean, std)).to(torch.bfloat16)
        loss = F.cross_entropy(work(x).float(), labels[rows], label_smoothing=SMOOTHING)
        loss.backward()
        lr = PEAK_LR * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * done))
        with torch.no_grad():
            for parameter, master in zip(parameters, masters, strict=True):
                master.grad, parameter.grad = parameter.grad.float(), None
            nn.utils.clip_grad_norm_(masters, 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
            for parameter, master in zip(parameters, masters, strict=True):
                parameter.copy_(master)
        step, seen, loss_sum = step + 1, seen + BATCH, loss_sum + float(loss)
        if step % 50 == 0:
            now = time.monotonic()
            report(done, loss_sum / 50, seen / (now - mark))
            mark, seen, loss_sum = now, 0, 0.0
    work.float().eval()
    work.patch_drop = nn.Identity()
    with torch.no_grad():
        for parameter, master in zip(work.parameters(), masters, strict=True):
            parameter.copy_(master)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images [N, C, H, W] uint8, in units of 0 ... 1."""
    sample = images[:10_000].float() / 255
    return (
        tuple(round(float(v), 4) for v in sample.mean((0, 2, 3))),
        tuple(round(float(v), 4) for v in sample.std((0, 2, 3))),
    )


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """images uint8 -> float32, each channel with mean 0 and standard deviation 1."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def augment(images: Tensor) -> Tensor:
    """Each of the images [B, C, H, W] shifted by up to an eighth, mirrored or not, and one in four with a hole."""
    count, _, height, width = images.shape
    reach = height // 8
    dy, dx = (torch.randint(-reach, reach + 1, (count, 1)) for _ in range(2))
    mirrored = torch.rand(count, 1) < 0.5
    rows = torch.arange(height)[None] + dy
    columns = torch.arange(width)[None]
    columns = torch.where(mirrored, width - 1 - columns, columns) + dx
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    hole_y, hole_x = (torch.randint(0, size, (count, 1)) for size in (height, width))
    hole_size = torch.randint(height // 8, height // 2 + 1, (count, 1)) * (torch.rand(count, 1) < 0.25)
    in_hole = ((torch.arange(height)[None] - hole_y).abs() * 2 < hole_size)[:, :, None]
    in_hole = in_hole & ((torch.arange(width)[None] - hole_x).abs() * 2 < hole_size)[:, None, :]
    picked = images[
        torch.arange(count)[:, None, None, None],
        torch.arange(images.shape[1])[None, :, None, None],
        rows.clamp(0, height - 1)[:, None, :, None],
        columns.clamp(0, width - 1)[:, None, None, :],
    ]
    lowest = images.amin((2, 3), keepdim=True)
    return torch.where((inside & ~in_hole)[:, None], picked, lowest)
