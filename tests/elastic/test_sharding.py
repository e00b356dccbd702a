"""Which of accelerate's settings for FSDP and DeepSpeed are accepted, and which are refused with one line."""

from __future__ import annotations

import pytest

from elastic import launch, sharding
from tests.pico.vision_language import make_vlm


@pytest.fixture
def fsdp(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The environment of one of two processes for which accelerate asks for FSDP2, to be changed further."""
    asked = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "0", **asked}.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_the_second_version_is_taken(fsdp: pytest.MonkeyPatch):
    sharding.require()
    assert launch.spreads()
    with pytest.raises(ValueError, match="say --no-bench"):
        sharding.refuse_timing()
    launch.forget()
    sharding.refuse_timing()
    assert not launch.spreads()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("FSDP_VERSION", "1", "say fsdp_version: 2"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "keeps all weights in every process"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "has no effect"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "train.checkpointing=true"),
    ],
)
def test_what_would_have_no_effect_is_refused(fsdp: pytest.MonkeyPatch, variable: str, value: str, said: str):
    fsdp.setenv(variable, value)
    with pytest.raises(ValueError, match=said):
        sharding.require()


def test_the_third_stage_of_deepspeed_is_the_same(fsdp: pytest.MonkeyPatch):
    fsdp.delenv("ACCELERATE_USE_FSDP")
    for name, value in {"USE_DEEPSPEED": "true", "DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu"}.items():
        fsdp.setenv(f"ACCELERATE_{name}", value)
    for name, value, said in (
        ("ZERO_STAGE", "2", "say zero_stage: 3"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "has no effect"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "say cpu"),
    ):
        with fsdp.context() as here:
            here.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
            here.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
            with pytest.raises(ValueError, match=said):
                launch.join()
    assert not launch.spreads()


def test_a_vision_tower_without_a_record_stays_whole():
    for name, gathered in (("llava", True), ("qwen2_vl", False)):
        model = make_vlm(name)
        tower = next(part for path, part in model.named_modules() if path.endswith(("visual", "vision_tower")))
        inside = set(tower.modules())
        units = sharding.units(model)
        assert any(module in inside for modules in units for module in modules) == gathered
        assert any(module not in inside for modules in units for module in modules)
