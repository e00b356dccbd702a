"""Train a small vision transformer from scratch: the recipe of the shipped image teacher."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from teachers.cache import published
from teachers.data.image_set import ImageSet
from teachers.data.images import load_all, load_images
from teachers.families.image import pack, unpack
from teachers.snapshot import Snapshot
from teachers.wording import number_of

if TYPE_CHECKING:
    from PIL.Image import Image

BATCH = 128
PEAK_LR = 2e-3
WEIGHT_DECAY = 0.05
SMOOTHING = 0.1
REPORT = 100
"""Steps between lines about progress, and between snapshots."""
DROPPED_PATCHES = ((0.0, 0.5), (0.5, 0.3), (0.75, 0.0))
"""PatchDropout (arXiv 2208.07220): pairs of a share of the run and the share of patches left out from there on."""
ARCHITECTURE = "vit_tiny_patch16_224"
"""timm's name of the model: depth 12, width 192, 3 heads."""
PATCH = 4


def pretrain(
    source: str,
    output: str | Path,
    *,
    epochs: int,
    start: str | Path | None = None,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> float:
    """Train a ViT-Tiny with patches of 4 x 4 pixels on images of one size and write it to the folder `output`.

    The folder is laid out as timm writes it, except that weights are int8: 5.4 million parameters take 5.4 MB. start: a
    folder written by this function, to continue from its weights at half the learning rate and with fewer patches left
    out. If a call is stopped, the same call resumes from `output`.part.safetensors. Returns the top-1 accuracy of the
    written model on the source's validation part. Raises ValueError for data that does not fit.
    """
    import timm
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save_file

    final = Path(output)
    if final.exists():
        raise ValueError(f"{final} exists: name another folder with --output")
    train = load_images(source, _as_bytes, held_out=1, seed=seed).train
    images, labels = _all(train)
    _, channels, height, width = images.shape
    if height != width or height % PATCH:
        raise ValueError(f"{source} has images of {width} x {height}; squares are needed whose side {PATCH} divides")
    arguments: dict[str, Any] = {"img_size": height, "patch_size": PATCH, "in_chans": channels}
    classes = len(train.classes) if train.classes else int(labels.max()) + 1
    test, answers = _all(load_all(source, _as_bytes))  # before an hour of training, in case they cannot be used
    torch.manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, num_classes=classes, **arguments)
    if start is not None:
        try:
            model.load_state_dict(unpack(load_file(Path(start) / "model.safetensors")))
        except (OSError, RuntimeError, SafetensorError):
            raise ValueError(
                f"{start} has no weights of this model: --start takes a folder that this command wrote, of images of "
                "the same size and as many classes"
            ) from None
    say(f"training {ARCHITECTURE} on {number_of(len(images), 'images')} of {source} for {number_of(epochs, 'epochs')}")
    about = {"data": source, "images": len(images), "epochs": epochs, "start": start and str(start), "seed": seed}
    part = final.with_name(f"{final.name}.part.safetensors")
    train_vit(model, images, labels, epochs, start is not None, part, about, say)
    mean, std = channel_statistics(images)
    state = pack(model.state_dict())
    model.load_state_dict(unpack(state))
    accuracy = top1(model, normalise(test, mean, std), answers)
    with published(final) as workshop:
        folder = workshop / final.name
        folder.mkdir()
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(
            json.dumps(_config(train.classes, classes, arguments, mean, std), indent=2) + "\n", encoding="utf-8"
        )
    part.unlink(missing_ok=True)
    return accuracy


def _config(
    names: Sequence[str] | None,
    classes: int,
    arguments: dict[str, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> dict[str, Any]:
    """Return the content of config.json as timm reads it; names: of the classes, None if they have none."""
    return {
        "architecture": ARCHITECTURE,
        "num_classes": classes,
        **({"label_names": names} if names else {}),
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [arguments["in_chans"], arguments["img_size"], arguments["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": mean,
            "std": std,
            "num_classes": classes,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _as_bytes(image: Image) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image)


def _all(images: ImageSet) -> tuple[Tensor, Tensor]:
    """Return all images [N, C, H, W] in uint8 and labels [N]; images of another size than most are left out.

    Raises ValueError if more than half of the images cannot be used, or if labels are missing.
    """
    found = images.load_readable(range(len(images)))
    if found is None:
        raise ValueError(f"none of {len(images):,} images can be used, {images.left_out.example}")
    pixels, labels = found
    if int(labels.min()) < 0:
        why = f": {images.unlabelled}" if images.unlabelled else ""
        raise ValueError(f"some images have no label, and this recipe needs one for each{why}")
    return pixels, labels


@torch.no_grad()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the top-1 accuracy of a model on normalised images [N, C, H, W]."""
    right = [model(x).argmax(-1) == y for x, y in zip(images.split(250), labels.split(250), strict=True)]
    return float(torch.cat(right).float().mean())


def train_vit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epochs: int,
    again: bool,
    part: Path,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Train a model in place on images [N, C, H, W] in uint8 and labels [N].

    Hidden matrices are trained by Muon (Jordan et al., 2024), all other parameters by AdamW. Master weights are
    float32; forward and backward run in bfloat16.

    Args:
        again: the model was trained by this function before; the peak learning rate is halved, and the schedule of left
            out patches starts in its middle.
        part: file for snapshots, from which a stopped run resumes.
        about: settings that identify the run, stored in snapshots (see `Snapshot`).
    """
    blocks: Any = model.blocks
    for block in blocks:
        block.attn.fused_attn = False  # on CPUs the fused kernel's backward would take half of a step's time
    mean, std = channel_statistics(images)
    masters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizers = _optimizers([name for name, _ in model.named_parameters()], masters)
    work = model.train().to(torch.bfloat16)
    parameters = list(work.parameters())
    peak = PEAK_LR / 2 if again else PEAK_LR
    batch = min(BATCH, len(images))
    steps = len(images) // batch * epochs
    order = torch.cat([torch.randperm(len(images))[: len(images) // batch * batch] for _ in range(epochs)])
    snapshot = Snapshot(part, optimizers, about)
    first = snapshot.restore()
    if first:
        say(f"going on after step {first}")
        _take_over(parameters, masters)
    mark, loss_sum = time.monotonic(), 0.0
    for step in range(first, steps):
        done = (step / steps + 1) / 2 if again else step / steps
        rows = order[step * batch : (step + 1) * batch]
        work.patch_drop = _patch_dropout(done)
        x = augment(normalise(images[rows], mean, std)).to(torch.bfloat16)
        loss = F.cross_entropy(work(x).float(), labels[rows], label_smoothing=SMOOTHING)
        loss.backward()
        lr = peak * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * step / steps))
        _update(parameters, masters, optimizers, lr)
        loss_sum += float(loss.detach())
        if (step + 1) % REPORT == 0:
            speed = REPORT / (time.monotonic() - mark)
            left = (steps - step - 1) / speed / 60
            rate = f"{speed * batch:.0f} images/s, {left:.0f} min left"
            snapshot.save(step + 1)
            say(f"step {step + 1}/{steps}: loss {loss_sum / REPORT:.3f}, {rate}")
            mark, loss_sum = time.monotonic(), 0.0
    work.float().eval()
    work.patch_drop = nn.Identity()
    _take_over(work.parameters(), masters)


def _optimizers(names: Sequence[str], masters: Sequence[nn.Parameter]) -> list[torch.optim.Optimizer]:
    """Return Muon for matrices in blocks and AdamW for all other parameters, without weight decay for vectors."""
    hidden = [m for m, n in zip(masters, names, strict=True) if n.startswith("blocks.") and m.ndim == 2]
    others = [m for m, n in zip(masters, names, strict=True) if not (n.startswith("blocks.") and m.ndim == 2)]
    decayed = [m for m in others if m.ndim > 1]
    plain = [m for m in others if m.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, lr=PEAK_LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, lr=PEAK_LR, weight_decay=WEIGHT_DECAY),
    ]


def _patch_dropout(done: float) -> nn.Module:
    """Return the module that leaves out patches when this share of the run is done."""
    from timm.layers import PatchDropout

    dropped = next(share for begin, share in reversed(DROPPED_PATCHES) if done >= begin)
    return PatchDropout(dropped, num_prefix_tokens=1) if dropped else nn.Identity()


@torch.no_grad()
def _update(
    parameters: Iterable[nn.Parameter],
    masters: Sequence[nn.Parameter],
    optimizers: Iterable[torch.optim.Optimizer],
    lr: float,
) -> None:
    """Take one optimizer step with the gradients of the bfloat16 parameters, which are cleared."""
    for parameter, master in zip(parameters, masters, strict=True):
        assert parameter.grad is not None, "the loss depends on all parameters"
        master.grad, parameter.grad = parameter.grad.float(), None
    nn.utils.clip_grad_norm_(masters, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    _take_over(parameters, masters)


@torch.no_grad()
def _take_over(parameters: Iterable[nn.Parameter], masters: Iterable[nn.Parameter]) -> None:
    """Copy the float32 master weights into the bfloat16 parameters."""
    for parameter, master in zip(parameters, masters, strict=True):
        parameter.copy_(master)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and standard deviation of each channel of images [N, C, H, W] in uint8, scaled to 0 ... 1; the first
    10,000 images are measured."""
    sample = images[:10_000].float() / 255
    return (
        tuple(round(float(v), 4) for v in sample.mean((0, 2, 3))),
        tuple(round(float(v), 4) for v in sample.std((0, 2, 3))),
    )


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Return uint8 images [N, C, H, W] in float32, each channel with mean 0 and standard deviation 1."""
    shape = (1, -1, 1, 1)
    return (images.float() / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)


def augment(images: Tensor) -> Tensor:
    """Return images [B, C, H, W] shifted by up to an eighth and mirrored at random, and a quarter of them with a random
    rectangle erased; empty places get the image's lowest value."""
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
