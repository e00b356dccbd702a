"""Quantize the linear layers of a frozen model, and inspect quantized parameters."""

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
"""The package that implements each scheme: int8 with a scale for each output, int4 and nf4 (arXiv 2305.14314) with a
scale for each group of inputs. Activations are not quantized."""
GROUPS = {"int4": (128, 64, 32), "nf4": (64,)}
"""Sizes of a group of inputs that shares a scale: the first that divides a layer's inputs is used. A layer whose inputs
no size divides is not quantized."""


def require(scheme: str) -> None:
    """Raise ValueError if the package that this scheme needs is missing."""
    if find_spec(PACKAGES[scheme]) is None:
        raise ValueError(
            f"quantization={scheme} needs a package that is missing: pip install {PACKAGES[scheme]} "
            "(or 'elastic-distill[quantized]')"
        )


def quantize(model: nn.Module, scheme: str, device: torch.device) -> None:
    """Quantize the linear layers of a model's blocks in place, one after the other, and put each on the device.

    Embeddings, projectors and heads are not quantized. Raises ValueError if the package is missing.
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
        # bitsandbytes quantizes a Params4bit when it moves to a device
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
    """Stop layers of bitsandbytes from repacking their weights at the first call on a CPU: after that, a layer's input
    would get no gradient, without any error."""
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def require_quantized(name: str, model: nn.Module) -> None:
    """Raise ValueError if weights that config.json says bitsandbytes has quantized are plain ones."""
    for key, module in model.named_modules():
        if type(module).__module__.startswith("bitsandbytes.") and not any(
            getattr(module.weight, scales, None) is not None for scales in ("quant_state", "SCB")
        ):
            raise plain(name, "bitsandbytes", f", such as {key}")


def plain(name: str, package: str, such: str = "") -> ValueError:
    """Return the error about weights that config.json says `package` has quantized, and that are plain ones."""
    scheme = next(scheme for scheme, known in PACKAGES.items() if known == package)
    return ValueError(
        f"{name}: config.json says that {package} has quantized the weights, and they are plain{such}: take "
        f"`quantization_config` out of config.json (--set quantization={scheme} quantizes them)"
    )


def quantized_by(name: str, folder: Path) -> str | None:
    """Return the name of the package that quantized the checkpoint in a folder, or None if it is not quantized, or in
    MXFP4, which is not kept (see `unpacking`).

    Raises ValueError if that package is not supported or is missing, and for LLM.int8() with a threshold, where tokens
    of a batch would change each other's outputs.
    """
    about = _quantization(folder)
    method = str(about.get("quant_method"))
    if not about or method == "mxfp4":
        return None
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


def unpacking(folder: Path) -> dict[str, Any]:
    """Return the options with which transformers turns weights in MXFP4, the experts' of gpt-oss, into the type that is
    asked for, without the package that would multiply by them as they are; none for other checkpoints."""
    if _quantization(folder).get("quant_method") != "mxfp4":
        return {}
    return {"quantization_config": import_module("transformers").Mxfp4Config(dequantize=True)}


def _quantization(folder: Path) -> dict[str, Any]:
    about = json.loads((folder / "config.json").read_text("utf-8")).get("quantization_config")
    return about if isinstance(about, dict) else {}  # transformers says what is wrong with anything else


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that store a parameter: the parameter itself or, if quantized, its codes, scales and so on."""
    state = getattr(tensor, "quant_state", None)  # bitsandbytes keeps scales in an object beside the packed weights
    if state is not None:
        import torch

        return [tensor.data, *(x for x in vars(state).values() if isinstance(x, torch.Tensor))]
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def kept_bytes(module: nn.Module, besides: str = "") -> int:
    """Return the bytes of a module's parameters, leaving out those on devices of the type `besides`."""
    return sum(x.nbytes for p in module.parameters() for x in plain_parts(p) if x.device.type != besides)
