"""Fixtures for commands, and for runs of tiny image models and vision-language models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file

from elastic.families import language
from teachers.families.image import pack
from teachers.families.vision_language import CHAT_TEMPLATE, IMAGE_TOKEN
from tests.elastic.runs import FEW_STEPS, Configure, as_options, configurations, write_images
from tests.pico.language import RUN_SETTINGS
from tests.pico.processors import COLORS, make_question_tokenizer
from tests.pico.vision_language import make_vlm


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory of the test's own; the value is its path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ELASTIC_TRACEBACK", raising=False)
    return tmp_path


@pytest.fixture
def arguments(model_folder: Path, text_file: Path) -> list[str]:
    """The arguments of a distillation that takes about a second."""
    return ["distill", "--model", str(model_folder), "--data", str(text_file), *as_options(RUN_SETTINGS)]


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes, each with 20 images to train on and 8 for validation."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, train=20, val=8)
    return folder


@pytest.fixture(scope="session")
def timm_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny timm ViT, with int8 weights as the recipe in recipes/ saves them."""
    folder = tmp_path_factory.mktemp("timm")
    arguments = dict(img_size=16, patch_size=4, embed_dim=64, depth=3, num_heads=4)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    save_file(pack(model.state_dict()), folder / "model.safetensors")
    pretrained = dict(input_size=[3, 16, 16], mean=[0.5] * 3, std=[0.25] * 3, crop_pct=1.0, interpolation="bicubic")
    pretrained |= dict(num_classes=7, first_conv="patch_embed.proj", classifier="head", fixed_input_size=True)
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 7, "model_args": arguments}
    config["label_names"] = ["bird", "cat", "cow", "deer", "dog", "frog", "horse"]
    (folder / "config.json").write_text(json.dumps({**config, "pretrained_cfg": pretrained}))
    return folder


@pytest.fixture(scope="session")
def configure_images(image_folder: Path, timm_folder: Path) -> Configure:
    settings = ["data.held_out=8", "calibration.windows=16", *FEW_STEPS]
    return configurations(settings, model=str(timm_folder), data__source=str(image_folder), budget__target=0.7)


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 12 images, each of a single colour, and two questions about each."""
    folder = tmp_path_factory.mktemp("questions")
    rows = []
    for number in range(12):
        color = list(COLORS)[number % 3]
        Image.new("RGB", (20, 20), COLORS[color]).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "w5 w6 w7", "answer": color})
        rows.append({"image": f"{number}.png", "question": "w8 w9", "answer": "w1"})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA and its processor, both written by `save_pretrained`."""
    folder, tokenizer = tmp_path_factory.mktemp("models") / "llava", make_question_tokenizer()
    model = make_vlm("llava")
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.config.vision_feature_select_strategy = "default"
    model.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size)
    more = dict(patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    processor = transformers.LlavaProcessor(
        images, tokenizer, image_token=IMAGE_TOKEN, chat_template=CHAT_TEMPLATE, **more
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def configure_questions(llava_folder: Path, questions: Path) -> Configure:
    settings = ["data.held_out=6", "calibration.windows=8", *FEW_STEPS]
    return configurations(settings, model=str(llava_folder), data__source=str(questions), budget__target=0.7)


@pytest.fixture
def without_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline `random` of language models fails."""
    made = language.baseline

    def baseline(name: str, *rest: Any) -> dict[str, Any]:
        if name == "random":
            raise ValueError("nothing can be drawn here")
        return made(name, *rest)

    monkeypatch.setattr(language, "baseline", baseline)
