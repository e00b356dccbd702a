"""Keep the linear layers of a frozen model in fewer bits, and look into layers that are."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers.quiet import quiet

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PACKAGES = {"int8": "torchao", "int4": "torchao", "nf4": "bitsandbytes"}
"""What quantizes, by scheme: int8 with a scale for each output, int4 and nf4 (arXiv 2305.14314) with one for each group
of inputs. Activations stay as they are."""
GROUPS = {"int4": (128, 64, 32), "nf4": (64,)}
"""Inputs that share a scale: the first number that divides them all. Layers that none divides stay as they are."""


def require(scheme: str) -> None:
    """ValueError where the package that this scheme needs is missing."""
    if find_spec(PACKAGES[scheme]) is None:
        raise ValueError(
            f"quantization={scheme} needs a package that is missing: pip install {PACKAGES[scheme]} "
            "(or 'elastic-distill[quantized]')"
        )


def quantize(model: nn.Module, scheme: str, device: torch.device) -> None:
    """Quantize the linear layers of a model's blocks in place, one after the other, and put each on the device.

    Embeddings, projectors and heads stay as they are. ValueError where the package is missing.
    """
    import torch

    require(scheme)
    with quiet(), torch.no_grad():
        for name, linear in list(model.named_modules()):
            if type(linear) is torch.nn.Linear and any(part.isdigit() for part in name.split(".")):
                _in_place_of(model, name, linear.to(device), scheme)


def _in_place_of(model: nn.Module, name: str, linear: nn.Linear, scheme: str) -> None:
    torch: Any = import_module("torch")
    group = next((size for size in GROUPS.get(scheme, (1,)) if linear.in_features % size == 0), None)
    if group is None:
        return
    if scheme == "nf4":
        bnb: Any = import_module("bitsandbytes")
        options = {"bias": linear.bias is not None, "quant_type": "nf4", "compute_dtype": linear.weight.dtype}
        small = bnb.nn.Linear4bit(linear.in_features, linear.out_features, device="meta", **options)
        # on its way to a device it is quantized
        packed = {"requires_grad": False, "quant_type": "nf4", "blocksize": group, "module": small}
        small.weight = bnb.nn.Params4bit(linear.weight.detach(), **packed)
        small.bias = linear.bias
        model.set_submodule(name, small.to(linear.weight.device).requires_grad_(False).train(linear.training))
        keep_differentiable(small)
        return
    ao: Any = import_module("torchao.quantization")
    if scheme == "int8":
        ao.quantize_(linear, ao.Int8WeightOnlyConfig(set_inductor_config=False))
    else:
        ao.quantize_(linear, ao.IntxWeightOnlyConfig(torch.int4, ao.PerGroup(group)))
    linear.requires_grad_(False)


def keep_differentiable(model: nn.Module) -> None:
    """Let no layer of bitsandbytes pack its weight anew when it first runs on a CPU: from then on, its input would get
    no gradient, and no error would say so."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def quantized_by(name: str, folder: Path) -> str | None:
    """What has quantized the checkpoint in a folder, None where nothing has.

    ValueError where it is not read so, or where tokens would change each other's outputs.
    """
    about = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config")
    if about is None:
        return None
    method = str(about.get("quant_method"))
    if method not in set(PACKAGES.values()):
        known = " and ".join(sorted(set(PACKAGES.values())))
        raise ValueError(f"{name} is quantized by {method}, which is not read: {known} are, and what is not quantized")
    if find_spec(method) is None:
        raise ValueError(f"{name} is quantized by {method}, which is missing: pip install {method}")
    if about.get("load_in_8bit") and about.get("llm_int8_threshold", 6.0) > 0:
        raise ValueError(
            f"{name}: llm_int8_threshold is {about.get('llm_int8_threshold', 6.0)} in config.json: inputs above it are "
            "looked for in all tokens of a batch, so that tokens change each other; set it to 0.0 there"
        )
    return method


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The tensors that a parameter is kept in: itself, or what a quantized one is made of."""
    state = getattr(tensor, "quant_state", None)  # bitsandbytes: beside the packed weights
    if state is not None:
        import torch

        return [tensor.data, *(x for x in vars(state).values() if isinstance(x, torch.Tensor))]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def kept_bytes(module: nn.Module, besides: str = "") -> int:
    """Bytes that a module's parameters take; besides: a kind of device, whose own are not counted."""
    return sum(x.nbytes for p in module.parameters() for x in plain_parts(p) if x.device.type != besides)
