"""Models with random weights in the shapes of known models, for timing without a download."""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import yaml

from teachers import families, hub
from teachers.quiet import one_line, quiet
from teachers.registry import LANGUAGE, models, resolve

if TYPE_CHECKING:
    import torch
    from torch import nn


_SIZES = (
    {"hidden_size", "n_embd", "text_config", "vision_config"},
    {"num_hidden_layers", "n_layer", "text_config", "vision_config"},
)
"""Keys of config.json that say how wide and how deep a model of transformers is, by their different names. Parts of a
model, such as `text_config`, leave away what is their class's default; of whole models transformers writes all."""


@dataclass(frozen=True)
class Shape:
    """Settings that a model with random weights is built from, of transformers (`config`) or timm; see
    configs/shapes.yaml."""

    name: str
    family: str
    config: dict[str, Any] | None = None
    timm: dict[str, Any] | None = None


@functools.cache
def shapes() -> Mapping[str, Shape]:
    """Return the table of shapes by name, read from `configs/shapes.yaml` in its order."""
    table = yaml.safe_load(resources.files("configs").joinpath("shapes.yaml").read_text("utf-8"))
    return MappingProxyType({name: Shape(name, **record) for name, record in table.items()})


def find_shape(name: str) -> Shape:
    """Return the shape called `name`, or the shape of the model called so (short name, hub id or folder), which is read
    from the model's config.json.

    Raises ValueError if there is no such shape or model, no config.json, or no shape in it.
    """
    if name in shapes():
        return shapes()[name]
    if name not in models() and "/" not in name and not Path(name).is_dir():
        near = difflib.get_close_matches(name.lower(), [*shapes(), *models()], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"no shape is called {name!r}{hint}; there are {', '.join(shapes())}; a model that `elastic models` "
            "lists, a hub id or a folder with config.json works, too"
        )
    entry = resolve(name)
    if entry.hub is not None and entry.hub.startswith("timm/"):
        return Shape(name, entry.family, timm={"model_name": entry.hub.removeprefix("timm/")})
    file = entry.folder / "config.json" if entry.folder else hub.config_file(entry.hub or name)
    if file is None:
        raise ValueError(
            f"{name}: its config.json is not in the hub's cache and cannot be downloaded: {hub.unreachable()}; "
            f"shapes that need none are {', '.join(shapes())}"
        )
    config = json.loads(file.read_text("utf-8"), object_hook=_plain)
    if "architecture" in config:
        return Shape(name, entry.family, timm={"model_name": f"local-dir:{file.parent}"})
    if LANGUAGE in config:  # the folder holds tower and projector only; the language model has its own configuration
        text: dict[str, Any] = find_shape(config.pop(LANGUAGE)).config or {}
        tied = {key: text[key] for key in ("tie_word_embeddings",) if key in text}
        config |= {"text_config": text, "image_token_index": text["vocab_size"] - 1, **tied}
    for keys in _SIZES:
        if not keys & config.keys():
            raise ValueError(
                f"{name}: config.json does not say how large the model is (none of {', '.join(sorted(keys))}): take "
                "the one that save_pretrained wrote"
            )
    return Shape(name, entry.also or entry.family, config)


def _plain(part: dict[str, Any]) -> Any:
    """Return a part of a config.json, or the number that it stands for where transformers has written an infinite one
    as {"__float__": "Infinity"} (Granite 4)."""
    return float(part["__float__"]) if part.keys() == {"__float__"} else part


def build(shape: Shape, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """Return a frozen model of this shape in eval mode, whose random weights are created directly on the device.

    On the device "meta" its tensors have shapes but no values.
    """
    import torch

    with one_line(f"{shape.name} cannot be built"), torch.device(device), quiet():
        model = families.of(shape.family).random_model(shape.config or shape.timm or {}, dtype)
    return model.eval().requires_grad_(False)
