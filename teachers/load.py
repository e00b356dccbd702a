"""Load a pretrained model as a teacher: frozen, in eval mode, and with a description of its source."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import families, hub, wheel
from teachers.quantize import (
    keep_differentiable,
    kept_bytes,
    plain_parts,
    quantize,
    quantized_by,
    require,
    require_quantized,
)
from teachers.quiet import quiet
from teachers.registry import ModelEntry, models, resolve
from teachers.wording import number_of

if TYPE_CHECKING:
    import torch
    from torch import Tensor


LOCAL = "local folder "
"""Beginning of `Teacher.source` for a model from a local folder of the user."""
_SAMPLES_PER_TENSOR = 64


@dataclass(frozen=True)
class Teacher:
    """A pretrained model, frozen and in eval mode, with its processor and a fingerprint of its weights."""

    name: str
    """The name that the user gave: short name, hub id or folder."""
    model: Any
    """The model, of transformers or timm; no parameter requires a gradient."""
    processor: Any
    """Converts raw inputs to the model's inputs: a tokenizer, a processor of images and text, or an image model's
    preprocessing; None for a model with random weights, whose inputs are random too."""
    family: str
    """How the model is trained and measured: "llm", "vit" or "vlm"."""
    source: str
    """Description of where the weights came from, for the user to read."""
    identity: str
    """Identifies architecture and weights (see `fingerprint`), to recognise a checkpoint made for another model."""


def load(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    quantization: str = "none",
    family: str | None = None,
    place: Callable[[Any], dict[str, Tensor]] | None = None,
) -> Teacher:
    """Load a model by short name, hub id or local folder, from safetensors weights only.

    `device` None is CUDA if available, else the CPU; `dtype` None is `preferred_dtype(device)`. quantization: the
    format of the linear layers' weights (see teachers/quantize.py); a checkpoint that is quantized already is read as
    it is. family: what to load it as, by default its own; "llm" is the language model alone of a vision-language model
    whose ModelEntry has it in `also`. place: called instead of moving the model to the device (for weights spread over
    processes); returns the weights that this process holds, by name. Until `place` is called, weights that the file has
    in `dtype` are memory-mapped, not copied.

    Raises ValueError for an unknown name or a model that is neither a language model, an image model nor a
    vision-language model, OSError if no source of the weights can be reached; both with one line.
    """
    import torch

    if quantization != "none":
        require(quantization)
    entry = resolve(name)
    family = family or entry.family
    folder, source = _locate(entry)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or preferred_dtype(device)
    with quiet():
        already = quantized_by(name, folder)
        if already and quantization != "none":
            raise ValueError(f"{name} is quantized already: leave quantization={quantization} away")
        if place is not None and (already or quantization != "none"):
            raise ValueError(f"{name}: quantized weights are not spread over processes (FSDP): use MULTI_GPU")
        found = families.of(family).load(name, folder, dtype, trust_remote_code)
    source += found.note
    model = found.model.eval().requires_grad_(False)
    if quantization != "none":
        _must_be_finite(name, dict(model.named_parameters()))
        identity = f"{fingerprint(model)}-{quantization}"
        quantize(model, quantization, device)
        source += f"; linear layers in {quantization}"
    else:
        if already:
            require_quantized(name, model)
            keep_differentiable(model)
            source += f"; quantized by {already}"
        identity = fingerprint(model)
    if place is not None:
        _must_be_finite(name, place(model))
    else:
        _must_fit(name, model, device)
        model = model.to(device)
        if quantization == "none":
            _must_be_finite(name, dict(model.named_parameters()))
    if found.unused:
        have = "has" if len(found.unused) == 1 else "have"
        weights = f"{number_of(len(found.unused), 'weights')} of the checkpoint {have} no place in this model"
        source += f"; {weights}, such as {found.unused[0]}"
    return Teacher(name, model, found.processor, family, source, identity)


def _must_fit(name: str, model: Any, device: torch.device) -> None:
    """Raise ValueError if a GPU has no room for the parameters that are not on a GPU yet."""
    need, free = kept_bytes(model, besides=device.type), free_bytes(device)
    if free is not None and need > free:
        raise ValueError(
            f"{name} takes {need / 1e9:.1f} GB, and {device} has {free / 1e9:.1f} GB free: a student reads single rows "
            "of its weights, so they are not spread over devices (device_map) or offloaded; quantization=int8 takes "
            "half of bfloat16, nf4 a quarter"
        )


def free_bytes(device: torch.device) -> int | None:
    """Return the free bytes of a GPU; None for other devices, as models are read into CPU memory first in any case."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _must_be_finite(name: str, weights: dict[str, Tensor]) -> None:
    for key, weight in weights.items():
        for part in plain_parts(weight):
            if part.numel() and not all(bound.isfinite() for bound in part.aminmax()):
                raise ValueError(f"{name}: the weights are damaged: {key} holds NaN or infinity")


def preferred_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 for GPUs and CPUs with instructions for it, else float32."""
    import torch

    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu":
        checks = (getattr(torch.cpu, name, None) for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"))
        if any(check() for check in checks if check):
            return torch.bfloat16
    return torch.float32


def fingerprint(model: Any) -> str:
    """Return an identifier of architecture and weights, such as "llama-1f0c...", the same however the model was loaded.

    Hashes every parameter's name and shape and 64 of its values, rounded to bfloat16, so that loading a checkpoint in
    float32 or bfloat16 gives the same identifier. (float16 does too, unless it cannot hold the checkpoint's values.)
    """
    import torch

    config = getattr(model, "config", None)  # timm's models have none
    if config is None:
        attentions = [getattr(block, "attn", None) or block.attns[0].attn for block in model.blocks]
        kind, heads = type(model).__name__.lower(), [getattr(attn, "num_heads", None) for attn in attentions]
    else:
        text, kind = config.get_text_config(), config.model_type
        names = "num_attention_heads", "num_key_value_heads"  # may differ between blocks: then getattr is refused
        heads = [vars(text).get(key) or getattr(text, key, None) for key in names]
    digest = hashlib.sha256(f"{kind} {heads}".encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        for part in plain_parts(parameter.detach()):
            values = part.reshape(-1)
            sample = values[:: max(1, len(values) // _SAMPLES_PER_TENSOR)][:_SAMPLES_PER_TENSOR]
            digest.update(sample.to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    return f"{kind}-{digest.hexdigest()[:16]}"


def _locate(entry: ModelEntry) -> tuple[Path, str]:
    """Return a local folder that holds the model, and a description of its source.

    Tried in this order: the entry's folder, the hub's cache, an earlier conversion, the hub, the wheel. Local copies go
    first, so that a model neither needs the network twice nor changes between two runs.
    """
    if entry.folder:
        shipped = entry.name in models()
        return entry.folder, "shipped with Elastic" if shipped else f"{LOCAL}{entry.folder.absolute()}"
    assert entry.hub is not None
    if cached := hub.cached_model(entry.hub):
        return cached, f"{entry.hub} in the Hugging Face cache, {cached}"
    if entry.wheel and (folder := wheel.converted_folder(entry)).is_dir():
        return folder, (
            f"{entry.wheel.requirement} from PyPI ({entry.wheel.note}), converted earlier to {folder}; "
            "remove that folder to ask the hub again"
        )
    reason = hub.unreachable()
    if reason is None:
        return hub.download_model(entry.hub), f"{entry.hub} from the Hugging Face hub"
    if entry.wheel:
        folder = wheel.convert(entry)
        return folder, (
            f"{entry.wheel.requirement} from PyPI ({entry.wheel.note}), converted to {folder}, "
            f"as the hub cannot be reached ({reason})"
        )
    raise OSError(
        f"{entry.hub} is not in the Hugging Face cache and the hub cannot be reached ({reason}): give a local folder, "
        "set HF_HOME to a cache that holds it, or try smollm2-135m, which needs no hub"
    )
