"""Load image models of timm or transformers from a folder with config.json and safetensors weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import hub
from teachers.data.classes import Classes, named, unnamed
from teachers.data.pictures import standard
from teachers.families import Loaded
from teachers.quiet import one_line
from teachers.registry import IMAGE_MODELS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from torch import nn

    from teachers.data.image_set import Preprocess

TIMM_MODELS = ("VisionTransformer", "VisionTransformerDistilled", "Eva")
"""timm's classes that are supported, if each block has separate attention and MLP modules."""
SUPPORTED = (
    "image models that are: vision transformers of timm (vit_*, deit_*, eva02_*), and of transformers "
    + ", ".join(sorted(IMAGE_MODELS))
)
"""The supported image models, for error messages."""
SCALES = ".scale"
"""Ending of the name of the tensor of scales [rows, 1] that belongs to an int8 weight of a shipped model, one scale for
each row."""


def load(name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    """Load the image model in `folder` and its preprocessing; raise a one-line ValueError if that fails."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    hub.require_weights(name, folder)
    if "architecture" not in config:
        return _transformers(name, folder, config, dtype, trust_remote_code)
    with one_line(f"{name} cannot be loaded"):
        model, preprocess = _timm(folder, dtype)
    parts = [{name for name, _ in block.named_children()} for block in getattr(model, "blocks", ())]
    if type(model).__name__ not in TIMM_MODELS or not all(
        {"attn", "mlp"} <= p or {"attns", "ffns"} <= p for p in parts
    ):
        raise ValueError(f"{name}: {config['architecture']} of timm is not supported; {SUPPORTED}")
    return Loaded(model, preprocess)


def random_model(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a model with random weights, of transformers if `settings` have a `model_type`, else of timm."""
    if "model_type" not in settings:
        import timm

        return timm.create_model(**settings).to(dtype)
    import transformers

    loader, options = _class_of(settings)
    config = transformers.AutoConfig.for_model(**settings)
    if (kind := getattr(loader, "config_class", None)) is not None and not isinstance(config, kind):
        config = config.vision_config  # CLIP and SigLIP: the image tower's part of the configuration
    for name in options.keys() & config.to_dict().keys():
        setattr(config, name, options.pop(name))
    make = loader.from_config if loader is transformers.AutoModel else loader._from_config
    model: nn.Module = make(config, dtype=dtype, **options)
    return model


def _timm(folder: Path, dtype: torch.dtype) -> tuple[nn.Module, Preprocess]:
    import timm
    from safetensors.torch import load_file
    from timm.data import create_transform, resolve_model_data_config

    state = load_file(folder / "model.safetensors")
    packed = any(name.endswith(SCALES) for name in state)
    model = timm.create_model(f"local-dir:{folder}", pretrained=not packed)
    if packed:
        model.load_state_dict(unpack(state))
    settings = resolve_model_data_config(model)
    transform, mode = create_transform(**settings, is_training=False), "L" if settings["input_size"][0] == 1 else "RGB"

    def preprocess(image: Image) -> torch.Tensor:
        return transform(standard(image, mode)).to(dtype)

    return model.to(dtype), preprocess


def _transformers(
    name: str, folder: Path, config: dict[str, Any], dtype: torch.dtype, trust_remote_code: bool
) -> Loaded:
    import transformers

    loader, options = _class_of(config)
    model, unused = hub.read_model(name, folder, loader, dtype, trust_remote_code, **options)
    kind = transformers.AutoImageProcessor
    processor = hub.read_beside(name, folder, "image processor", kind, trust_remote_code, "*processor*")
    mode = "L" if model.config.num_channels == 1 else "RGB"

    def preprocess(image: Image) -> torch.Tensor:
        return processor(standard(image, mode), return_tensors="pt")["pixel_values"][0].to(dtype)

    # weights of parts that the model does not have (text towers, decoders, heads) are dropped on purpose: not reported
    parts = {key.partition(".")[0] for key in model.state_dict()}
    unused = [key for key in unused if key.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in parts]
    return Loaded(model, preprocess, unused)


def _class_of(config: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the transformers class that loads a model with this configuration, and options for the model."""
    import transformers

    kind, saved_as = config["model_type"], (config.get("architectures") or [""])[0]
    if saved_as.endswith(("ForImageClassification", "ForImageClassificationWithTeacher")):
        return getattr(transformers, saved_as), {}
    if kind in ("clip", "clip_vision_model"):
        return transformers.CLIPVisionModel, {}
    if kind in ("siglip", "siglip_vision_model"):
        return transformers.SiglipVisionModel, {}
    if kind == "vit_mae":
        return transformers.ViTMAEModel, {"mask_ratio": 0.0}
    return transformers.AutoModel, {"add_pooling_layer": False} if kind in ("vit", "deit") else {}


def classes_of(model: Any) -> Classes | None:
    """Return the classes of an image model, with the names in its configuration; None if it has no classifier."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        if not any(hasattr(model, name) for name in ("classifier", "cls_classifier")):
            return None
        labels = {int(number): [str(name)] for number, name in (model.config.id2label or {}).items()}
        for name, number in (model.config.label2id or {}).items():
            labels.setdefault(int(number), []).append(str(name))
        return named(labels)
    if not model.num_classes:
        return None
    settings = model.pretrained_cfg
    names, about = settings.get("label_names"), settings.get("label_descriptions") or {}
    if not names:
        return unnamed(model.num_classes)
    listed = names if isinstance(names, dict) else dict(enumerate(names))
    found = {int(number): [name, *filter(None, [about.get(name)])] for number, name in listed.items()}
    return named({number: found.get(number, []) for number in range(model.num_classes)})


def pack(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return weights with every matrix rounded to int8, with one scale for each row: a quarter of the size."""
    packed = {}
    for name, tensor in state.items():
        if tensor.ndim < 2 or tensor.numel() < 4096:
            packed[name] = tensor.float().contiguous()
            continue
        rows = tensor.float().flatten(1) if tensor.shape[0] > 1 else tensor.float().flatten(0, -2)
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12)
        packed[name] = (rows / scale).round().char().view(tensor.shape).contiguous()
        packed[name + SCALES] = scale
    return packed


def unpack(packed: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights that `pack` packed, in float32."""
    state = {}
    for name, tensor in packed.items():
        if name.endswith(SCALES):
            continue
        scale = packed.get(name + SCALES)
        state[name] = tensor if scale is None else (tensor.float().view(len(scale), -1) * scale).view(tensor.shape)
    return state
