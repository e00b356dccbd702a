"""Checks that reject models or specifications for other reasons than the architecture, such as quantized weights."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from students.architectures import Architecture, can_be_read_in_part
from students.spec import StudentSpec


def check_place(model: nn.Module) -> None:
    """Raise ValueError if weights are on several devices, or are offloaded and present only while a layer runs."""
    devices = {parameter.device for parameter in model.parameters()}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())  # set by accelerate
    if len(devices) > 1 or (hooked and any(device.type == "meta" for device in devices)):
        raise ValueError(
            "this model is spread over devices or offloaded (device_map): a student reads single rows of its weights, "
            "which must lie on one device; load it without device_map, in int8 or nf4 if it is too large"
        )


def check_head(model: PreTrainedModel, spec: StudentSpec) -> None:
    """Raise ValueError if a vocab router has to read single rows of an LM head that is quantized."""
    head = model.get_output_embeddings()
    if spec.at("head") and not can_be_read_in_part(head):
        raise ValueError("the LM head of this model is quantized, and no row of it is read alone: no vocab routers")


def check_corrections(record: Architecture, block: nn.Module, spec: StudentSpec) -> None:
    """Raise ValueError if a linear layer that is never called should get a low-rank correction: some attention modules
    of timm multiply by the layer's weight themselves, with a bias that they concatenate."""
    if record.causal or not spec.lora.rank or "attn_in" not in spec.lora.sites:
        return
    attention = block.get_submodule(record.attn)
    if getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", False):
        raise ValueError(
            "the attention of this model reads the weights of its first layer itself: no low-rank corrections there, "
            "set lora.sites to some of attn_out, mlp_in, mlp_out"
        )
