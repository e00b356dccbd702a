"""Models that students are not made of, whatever their architecture."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from students.architectures import Architecture, can_be_read_in_part
from students.spec import StudentSpec


def check_place(model: nn.Module) -> None:
    """ValueError where weights are spread over devices, or come to theirs only while a layer runs."""
    devices = {parameter.device for parameter in model.parameters()}
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())  # by accelerate
    if len(devices) > 1 or (hooked and any(device.type == "meta" for device in devices)):
        raise ValueError(
            "this model is spread over devices or offloaded (device_map): a student reads single rows of its weights, "
            "which must lie on one device; load it without device_map, in int8 or nf4 if it is too large"
        )


def check_head(model: PreTrainedModel, spec: StudentSpec) -> None:
    """ValueError where single rows of the LM head are to be read, and cannot be."""
    head = model.get_output_embeddings()
    if spec.at("head") and not can_be_read_in_part(head):
        raise ValueError("the LM head of this model is quantized, and no row of it is read alone: no vocab routers")


def check_corrections(record: Architecture, block: nn.Module, spec: StudentSpec) -> None:
    """ValueError where a layer is to be corrected that its module does not call: some of timm's attentions multiply by
    the weight themselves, with a bias that they put together."""
    if record.causal or not spec.lora.rank or "attn_in" not in spec.lora.sites:
        return
    attention = block.get_submodule(record.attn)
    if getattr(attention, "q_bias", None) is not None and not getattr(attention, "qkv_bias_separate", False):
        raise ValueError(
            "the attention of this model reads the weights of its first layer itself: no low-rank corrections there, "
            "set lora.sites to some of attn_out, mlp_in, mlp_out"
        )
