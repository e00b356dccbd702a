"""Every supported architecture, saved with its library's own settings, loaded and run by the command line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from elastic.cli import main
from elastic.run import Run
from students.architectures.lookup import ARCHITECTURES
from students.architectures.vision_language import VISION_TOWERS
from tests.elastic.runs import as_options, write_images
from tests.pico.language import MORE, TINY, TINY_FLAT, TINY_HYBRIDS, TINY_MIXTURES
from tests.pico.processors import make_processor
from tests.pico.vision_language import ALIKE, CONFIGS, make_vlm

LARGE = 0.95
"""A budget that every architecture can meet."""
ANY_NUMBER = "student.routers=[{kind: layer, blocks: odd, selection: quota, kv: drop, dropped: merge}]"
"""The default routers of image models, but keeping any number of patches instead of multiples, which budgets of so few
patches would miss: the dial is then set once instead of twice (test_budgets.py: multiples give way to a budget)."""
_SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4
)
_TIMM = dict(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=4, num_classes=7)
IMAGE_MODELS = {
    "vit": ("ViTConfig", "ViTForImageClassification"),
    "deit": ("DeiTConfig", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Config", "Dinov2Model"),
    "dinov2_with_registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersModel"),
    "dinov3_vit": ("DINOv3ViTConfig", "DINOv3ViTModel"),
    "ijepa": ("IJepaConfig", "IJepaForImageClassification"),
    "clip": ("CLIPVisionConfig", "CLIPVisionModel"),
    "siglip": ("SiglipVisionConfig", "SiglipVisionModel"),
    "vit_mae": ("ViTMAEConfig", "ViTMAEModel"),
    "vit_msn": ("ViTMSNConfig", "ViTMSNForImageClassification"),
    "timm/vit_small_patch16_18x2_224": (),
    "timm/deit_tiny_distilled_patch16_224": (),
    "timm/vit_tiny_patch16_224": (),
    "timm/vit_small_patch14_reg4_dinov2": (),
    "timm/vit_base_patch16_siglip_224": (),
    "timm/eva02_tiny_patch14_224": (),
    "timm/vit_small_patch16_dinov3": (),
}


def distil(model: Path, data: Path, run: Path, *settings: str) -> dict:
    """Distil for two steps by the command line, in the machine's default precision, and return the run's result."""
    given = as_options([*settings, "train.log_every=1"])
    names = ["--model", str(model), "--data", str(data), "--output", str(run), "--steps", "2"]
    assert main(["distill", *names, "--target-compute", str(LARGE), *given]) in (0, 3)
    return Run.open(run).about["result"]


def test_every_record_of_names_is_tried() -> None:
    tiny = TINY | TINY_MIXTURES | MORE | TINY_FLAT | TINY_HYBRIDS
    config_of = {name: getattr(transformers, kind).model_type for name, (kind, _) in tiny.items()}
    inside = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "glm4v_text", "gemma"}  # inside those of CONFIGS
    inside |= {"qwen3_vl_moe_text", "glm4v_moe_text"}
    tried = {
        *config_of.values(),
        *inside,
        "clip_vision_model",
        "siglip_vision_model",
        "VisionTransformer",
        "VisionTransformerDistilled",
        "Eva",
    }
    assert set(ARCHITECTURES) - tried <= {name for name in IMAGE_MODELS if "/" not in name}
    assert set(VISION_TOWERS) <= set(CONFIGS)


def _bytes() -> transformers.PreTrainedTokenizerFast:
    """Return a tokenizer of bytes, built of the parts that transformers gives to the tokenizers of some models."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names)


@pytest.mark.parametrize("name", [*TINY, "qwen3_5"])
def test_a_saved_language_model(name: str, text_file: Path, tmp_path: Path) -> None:
    kind, settings = (TINY | TINY_HYBRIDS)[name]
    sizes = set(settings if name in TINY_HYBRIDS else TINY["gpt2" if name == "gpt2" else "llama"][1])
    torch.manual_seed(0)
    settings = {key: value for key, value in settings.items() if key in sizes}
    config = getattr(transformers, kind)(**{**settings, "vocab_size": 300})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    _bytes().save_pretrained(tmp_path / "model")
    given = ("data.window=32", "data.held_out=4", "train.window=16", "train.batch=2", "calibration.windows=2")
    row = distil(tmp_path / "model", text_file, tmp_path / "run", *given)
    assert row["compute"] == pytest.approx(LARGE, abs=0.015)
    assert main(["generate", str(tmp_path / "run"), "--prompt", "w3 w4", "--max-new-tokens", "3"]) == 0


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    images = write_images(folder, train=8, val=4)
    rows = [
        {"image": str(image.relative_to(folder)), "question": "w5 w6", "answer": f"w{int(image.stem) % 3}"}
        for image in images
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_a_saved_image_model(name: str, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = tmp_path / "model"
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"), **_TIMM)
        model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 16, 16)}  # for those of any size
        timm.models.save_for_hf(model, folder, model_args=_TIMM, safe_serialization=True)
    else:
        config, model = (getattr(transformers, kind) for kind in IMAGE_MODELS[name])
        model(config(**_SIZES)).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    settings = ("data.held_out=4", "calibration.windows=8", "train.batch=4", *([] if name == "vit" else [ANY_NUMBER]))
    row = distil(folder, pictures, tmp_path / "run", *settings)
    assert row["compute"] == pytest.approx(LARGE, abs=0.06)  # one of 16 patches is up to 0.05
    assert main(["eval", str(tmp_path / "run"), "--json"]) == 0


@pytest.mark.thorough
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ALIKE and name != "cohere2_vision"])
def test_a_saved_vision_language_model(name: str, pictures: Path, tmp_path: Path) -> None:
    if name == "smolvlm" and find_spec("num2words") is None:
        pytest.skip("the processor of SmolVLM needs num2words")
    model = make_vlm(name)
    if name == "llava":
        model.config.vision_feature_select_strategy = "default"
    model.save_pretrained(tmp_path / "model")
    make_processor(name).save_pretrained(tmp_path / "model")
    settings = ("data.held_out=4", "calibration.windows=4", "train.batch=2")
    row = distil(tmp_path / "model", pictures / "questions.jsonl", tmp_path / "run", *settings)
    assert row["compute"] == pytest.approx(LARGE, abs=0.05)  # of 4 or 16 image tokens, one is a large step
    picture = str(pictures / "train" / "cat" / "0.png")
    arguments = ["--prompt", "w5", "--image", picture, "--max-new-tokens", "2"]
    assert main(["generate", str(tmp_path / "run"), *arguments]) == 0
