"""Load vision-language models, or put them together of their parts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import hub
from teachers.families import Loaded
from teachers.families.image import unpack
from teachers.registry import LANGUAGE

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

IMAGE_TOKEN = "<file_sep>"
"""What stands for an image token in those models: a token that SmolLM2 has and prose has not."""
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    + IMAGE_TOKEN
    + "{% else %}\n{{ 'Q: ' if message['role'] == 'user' else 'A: ' }}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}\nA:{% endif %}"
)
"""Shorter than SmolLM2's own: an answer is learned sooner where it is nearer to the question."""


def load(name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    """The vision-language model in `folder`, of which there may be tower and projector only, and its processor;
    ValueError of one line where something is wrong."""
    import transformers

    from teachers.load import load as load_teacher

    if (language := language_of(folder)) is not None:
        base = load_teacher(language, dtype=dtype, device="cpu")
        return Loaded(*compose(folder, base.model, base.processor), note=f"; language model: {base.source}")
    hub.require_weights(name, folder)
    model, unused = hub.read_model(name, folder, transformers.AutoModelForImageTextToText, dtype, trust_remote_code)
    kind = transformers.AutoProcessor
    processor = hub.read_beside(name, folder, "processor", kind, trust_remote_code, "*processor*")
    return Loaded(model, processor, unused)


def random_model(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """A model of transformers with random weights, of these settings of its configuration."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(**settings), dtype=dtype)


def language_of(folder: Path) -> str | None:
    """The name of the language model that a vision tower and projector in `folder` were made for, or None."""
    return json.loads((folder / "config.json").read_text("utf-8")).get(LANGUAGE)


def compose(
    folder: Path, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A LLaVA (arXiv 2304.08485) of a language model, taken over as it is, and the tower and projector in `folder`."""
    from safetensors.torch import load_file

    dtype = next(language.parameters()).dtype
    model: Any = assemble(json.loads((folder / "config.json").read_text("utf-8")), language, tokenizer)
    model.load_state_dict(unpack(load_file(folder / "model.safetensors")), strict=False)
    return model.to(dtype), processor_for(model, tokenizer)


def assemble(
    settings: dict[str, Any], language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """As `compose`, with a tower and projector that are yet to be trained; settings: those of LlavaConfig, without a
    text part."""
    import torch
    from transformers import AutoModel, LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    settings = {key: value for key, value in settings.items() if key not in (LANGUAGE, "model_type")}
    image: Any = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = LlavaConfig(text_config=language.config.to_dict(), image_token_index=image, **settings)
    config.tie_word_embeddings = language.config.tie_word_embeddings
    with torch.device("meta"):
        model = LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    tower = AutoModel.from_config(config.vision_config, attn_implementation="sdpa")
    model.model.vision_tower, model.model.multi_modal_projector = tower, LlavaMultiModalProjector(config)
    model.model.language_model, model.lm_head = language.base_model, language.lm_head
    model.generation_config = language.generation_config
    return model.eval()


def processor_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> ProcessorMixin:
    """The processor of a model that `assemble` made: images to 64 x 64 or whatever its size is, values in -1 ... 1."""
    from transformers import LlavaProcessor, SiglipImageProcessor

    vision = model.config.vision_config
    size = {"height": vision.image_size, "width": vision.image_size}
    images = SiglipImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    return LlavaProcessor(
        images,
        tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
