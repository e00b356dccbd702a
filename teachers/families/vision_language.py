"""Load vision-language models, or assemble one from a language model, a vision tower and a projector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teachers import hub
from teachers.families import Loaded
from teachers.families.image import unpack
from teachers.quiet import one_line
from teachers.registry import LANGUAGE

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

IMAGE_TOKEN = "<file_sep>"
"""Placeholder of an image token in assembled models: a token in SmolLM2's vocabulary that does not occur in prose."""
CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    + IMAGE_TOKEN
    + "{% else %}\n{{ 'Q: ' if message['role'] == 'user' else 'A: ' }}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}\nA:{% endif %}"
)
"""Chat template of assembled models, shorter than SmolLM2's own: an answer nearer to its question is learned sooner."""


def load(name: str, folder: Path, dtype: torch.dtype, trust_remote_code: bool) -> Loaded:
    """Load the vision-language model in `folder` and its processor; a folder with tower and projector only names the
    language model to add in its config.json. Raises a one-line ValueError if that fails."""
    import transformers

    from teachers.load import load as load_teacher

    if (language := language_of(folder)) is not None:
        base = load_teacher(language, dtype=dtype, device="cpu")
        return Loaded(*compose(folder, base.model, base.processor), note=f"; language model: {base.source}")
    with one_line(f"{name}: config.json cannot be used"):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        _require_features(config)
    hub.require_weights(name, folder, config)
    model, unused = hub.read_model(name, folder, transformers.AutoModelForImageTextToText, dtype, trust_remote_code)
    kind = transformers.AutoProcessor
    processor = hub.read_beside(name, folder, "processor", kind, trust_remote_code, "*processor*")
    return Loaded(model, processor, unused)


def random_model(settings: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """Return a transformers model with random weights; settings: of its configuration, `model_type` included."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**settings)
    _require_features(config)
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def _require_features(config: Any) -> None:
    """Raise ValueError if the language model is to read the output of a block that the vision tower does not have."""
    asked = getattr(config, "vision_feature_layer", None)
    blocks = getattr(config.vision_config, "num_hidden_layers", None)
    for layer in asked if isinstance(asked, list | tuple) else [asked]:
        if layer is not None and blocks is not None and not -blocks - 1 <= layer <= blocks:
            raise ValueError(f"vision_feature_layer is {layer}, and the vision tower has {blocks} blocks")


def language_of(folder: Path) -> str | None:
    """Return the name of the language model that the tower and projector in `folder` were trained for; None if `folder`
    holds a whole model."""
    return json.loads((folder / "config.json").read_text("utf-8")).get(LANGUAGE)


def compose(
    folder: Path, language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Return a LLaVA model (arXiv 2304.08485) made of an unchanged language model and the tower and projector in
    `folder`, and its processor."""
    from safetensors.torch import load_file

    dtype = next(language.parameters()).dtype
    model: Any = assemble(json.loads((folder / "config.json").read_text("utf-8")), language, tokenizer)
    model.load_state_dict(unpack(load_file(folder / "model.safetensors")), strict=False)
    return model.to(dtype), processor_for(model, tokenizer)


def assemble(
    settings: dict[str, Any], language: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Return a LLaVA model made of a language model and a tower and projector with random weights; settings: of
    LlavaConfig, without `text_config`."""
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
    """Return the processor of a model made by `assemble`: it resizes images to the tower's size (64 x 64 for those
    shipped) and scales values to -1 ... 1."""
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
