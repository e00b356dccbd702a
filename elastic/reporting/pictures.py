"""Pictures embedded in a report."""

from __future__ import annotations

import base64
import io

import torch
from einops import rearrange
from torch import Tensor, nn

WIDTH = 112
"""Approximate width in pixels of a picture in a report."""


def data_uri(pixels: Tensor, opaque: Tensor | None = None) -> str:
    """Return pixels [C, H, W] of any range, rescaled to their minimum and maximum, as the data URI of a WebP image;
    opaque: opacity of each patch [h, w], 0 to 1."""
    from PIL import Image

    size = max(1, round(WIDTH / pixels.shape[-1])) * pixels.shape[-1] if pixels.shape[-1] < WIDTH else WIDTH
    mode = "nearest" if size > pixels.shape[-1] else "area"
    pixels = (pixels.float() - pixels.min()) / (pixels.max() - pixels.min()).clamp(min=1e-6)
    picture = nn.functional.interpolate(pixels.expand(3, -1, -1)[None], size=size, mode=mode)[0]
    if opaque is not None:
        alpha = nn.functional.interpolate(opaque.clamp(0, 1)[None, None], size=size, mode="nearest")[0]
        picture = torch.cat([picture, alpha])
    file = io.BytesIO()
    shades = rearrange((255 * picture).round().byte(), "colour height width -> height width colour")
    Image.fromarray(shades.numpy()).save(file, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()
