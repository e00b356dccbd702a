"""Forward passes of image models with quotas have fixed shapes: they never wait, and recorded ones agree with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from students import RouterSpec
from students.families.image import ImageStudent, call
from students.kernels import capture, devices
from students.kernels.capture import Forward
from tests.pico.image import MODELS, first, make_tiny
from tests.students.host_waits import NoHostWaits
from tests.students.tape import Tape
from tests.students.test_image import HALF, SPECS, routed

pytestmark = pytest.mark.usefixtures("no_gradients")

OVER_TOKENS = {name: [r for r in routers if r.kind in ("layer", "token")] for name, routers in SPECS.items()}
QUOTAS = [name for name, routers in OVER_TOKENS.items() if "threshold" not in {r.selection for r in routers}]


def student_for(name: str, spec: str, pixels: Tensor) -> ImageStudent:
    student = routed(name, spec, pixels)
    assert isinstance(student, ImageStudent)
    return student


@pytest.mark.parametrize(("name", "spec"), [case for case in HALF if case[1] in QUOTAS and case[0] != "vit_mae"])
def test_nothing_waits_and_recorded_passes_say_what_the_model_says(name: str, spec: str, pixels: Tensor) -> None:
    """The embeddings of vit_mae, which is left out, set a slice to a number, which takes a copy on CPUs."""
    student, made = student_for(name, spec, pixels), []
    call(student.model, pixels)
    with NoHostWaits():
        call(student.model, pixels)
    student._recorded.recorder = Tape
    for offset, images in ((0.0, pixels), (0.0, pixels.flip(0)), (0.0, pixels[:1]), (0.4, pixels), (0.0, pixels)):
        student.runtime.offset, before = offset, Tape.made
        torch.testing.assert_close(first(student.predict(images)), first(call(student.model, images)))
        made.append(Tape.made - before)
    static = any(router.network == "static" for router in SPECS[spec])
    assert made == [1, 0, 1, 1, int(static)], "a static choice slices weights anew"
    with student.teacher():
        assert torch.equal(first(student.predict(pixels)), first(call(student.model, pixels)))


@pytest.mark.parametrize("name", ["timm_fused", "timm_eva02", "siglip"])
def test_substitutes_where_the_host_runs_ahead(name: str, pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPECS, "substitutes", (RouterSpec("token", selection="quota", kv="drop", substitute=3),))
    student = student_for(name, "substitutes", pixels)
    plain = first(call(student.model, pixels))
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    student._recorded.recorder = Tape
    torch.testing.assert_close(first(student.predict(pixels)), plain, rtol=1e-3, atol=1e-3)
    assert len(student._recorded.kept) == 1


def test_two_layer_routers_merge_without_a_wait(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    router = RouterSpec("layer", selection="quota", kv="drop", dropped="merge", network="mlp")
    monkeypatch.setitem(SPECS, "merges", (router,))
    test_nothing_waits_and_recorded_passes_say_what_the_model_says("timm_fused", "merges", pixels)
    student = student_for("timm_fused", "merges", pixels)
    skipped = first(call(student.model, pixels))
    student.runtime.execution = "mask"
    torch.testing.assert_close(skipped, first(call(student.model, pixels)), rtol=1e-3, atol=1e-3)


def test_new_quotas_are_recorded_anew(pixels: Tensor) -> None:
    student = student_for("timm_fused", "block merges", pixels)
    student._recorded.recorder = Tape
    student.predict(pixels)
    for placed in student.routers():
        placed.router.set_quota(torch.linspace(-2.0, 0.5, 50))
    torch.testing.assert_close(student.predict(pixels), call(student.model, pixels))
    assert len(student._recorded.kept) == 2


@pytest.mark.parametrize("spec", ["block adaptive", "branches adaptive"])
def test_what_depends_on_the_images_runs_as_ever(spec: str, pixels: Tensor) -> None:
    student = student_for("timm_fused", spec, pixels)
    student._recorded.recorder, before = Tape, Tape.made
    with pytest.warns(UserWarning, match="depends on the images"):
        student.predict(pixels)
    with warnings.catch_warnings():  # no second warning
        warnings.simplefilter("error")
        assert torch.equal(student.predict(pixels), call(student.model, pixels)) and Tape.made == before
    student = student_for("timm_fused", "block merges", pixels)
    student._recorded.recorder, student.runtime.offset = Tape, (0.0, 0.5, 1.0)
    with pytest.warns(UserWarning, match="differs between them"):
        assert torch.equal(student.predict(pixels), call(student.model, pixels)) and Tape.made == before


@pytest.mark.parametrize(("spec", "planned"), [("block adaptive", False), ("block merges", True)])
def test_no_length_that_images_decide_is_planned_for(
    spec: str, planned: bool, pixels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's attention, which plans anew for each shape, is off where images decide the number of keys."""
    student, seen, attend = student_for("timm_fused", spec, pixels), set(), F.scaled_dot_product_attention

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.add(torch.backends.cuda.cudnn_sdp_enabled())
        return attend(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    call(student.model, pixels)
    assert seen == {planned} and torch.backends.cuda.cudnn_sdp_enabled()


def test_a_frozen_model_and_no_recorder(pixels: Tensor) -> None:
    model = MODELS["timm_fused"]()
    recorded = Forward(lambda images: call(model, images), recorder=Tape)
    assert torch.equal(recorded(pixels), call(model, pixels)) and len(recorded.kept) == 1
    plain = Forward(lambda images: call(model, images))
    assert torch.equal(plain(pixels), call(model, pixels)) and not plain.kept


def test_under_autocast_nothing_is_recorded(pixels: Tensor) -> None:
    model = MODELS["timm_fused"]()
    recorded = Forward(lambda images: call(model, images), recorder=Tape)
    about = r"^images without recorded passes: under torch\.autocast"
    with torch.autocast("cpu", torch.bfloat16), pytest.warns(UserWarning, match=about):
        assert torch.equal(recorded(pixels), call(model, pixels))
    assert not recorded.kept and torch.equal(recorded(pixels), call(model, pixels))


def test_what_cannot_be_recorded_runs_as_ever(pixels: Tensor) -> None:
    def refuse(work: Any) -> Any:
        raise RuntimeError("out of memory")

    student = student_for("timm_fused", "block merges", pixels)
    student._recorded.recorder = refuse
    with pytest.warns(UserWarning, match=r"recording failed \(out of memory\)"):
        student.predict(pixels.flip(0))
    assert torch.equal(student.predict(pixels), call(student.model, pixels))


def test_a_graph_has_a_workspace_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch frees the workspace of a stream with any graph captured on it, while the others still write to it."""
    did: list[str] = []

    @contextmanager
    def capturing(*args: Any, **kwargs: Any) -> Iterator[None]:
        did.append("begin")
        yield
        did.append("end")

    before = MagicMock()
    before.wait_stream = lambda side: did.append("join")
    fakes = {"graph": capturing, "CUDAGraph": MagicMock, "stream": nullcontext, "device": nullcontext}
    for name, fake in {**fakes, "current_stream": lambda: before, "current_device": lambda: 0}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(capture, "_stream", MagicMock())
    monkeypatch.setattr(capture.counters, "lent", lambda device: nullcontext())
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: did.append("clear"), raising=False)
    capture.CudaGraph(lambda: did.append("work"))
    assert did == ["work"] * capture.WARM_UP + ["join", "clear", "begin", "work", "end", "clear"]
    did.clear()
    with pytest.raises(RuntimeError, match="memory"):
        capture.CudaGraph(Mock(side_effect=RuntimeError("out of memory")))
    assert did == ["join"], "what the caller does next comes after what was launched"


@pytest.mark.gpu
def test_a_dropped_graph_takes_no_memory_of_others() -> None:
    weight = torch.randn(256, 256, device="cuda")
    inputs = torch.randn(3, 64, 256, device="cuda")  # stay, since graphs read them again
    graphs = [capture.CudaGraph(lambda x=x: x @ weight @ weight) for x in inputs]
    expected = [graph().clone() for graph in graphs]
    del graphs[0]
    torch.cuda.empty_cache()
    taken = [torch.zeros(2**25, dtype=torch.uint8, device="cuda") for _ in range(8)]
    for graph, result in zip(graphs, expected[1:], strict=True):
        assert torch.equal(graph(), result)
    assert not any(bool(x.any()) for x in taken)


def test_rotary_embeddings_of_a_size_are_made_once(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm's DINOv3 copies coordinates from the host, which a CUDA graph cannot hold; in training it draws them."""
    model = make_tiny("timm_dinov3")
    larger = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    expected, made = [model(images) for images in (pixels, larger)], []
    create = type(model.rope)._create_embed
    monkeypatch.setattr(type(model.rope), "_create_embed", lambda *args: made.append(args[1]) or create(*args))
    for _ in range(2):
        assert all(torch.equal(call(model, x), y) for x, y in zip((pixels, larger), expected, strict=True))
    assert list(map(tuple, made)) == [(4, 4), (6, 6)]
    model.rope.train()
    call(model, pixels)
    assert len(made) == 3
    assert torch.equal(call(copy.deepcopy(model).double(), pixels.double()), model.double()(pixels.double()))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "spec"),
    [
        *(("timm_fused", spec) for spec in ("block merges", "multiples of 4 merge", "block stays")),
        *((name, "block merges") for name in ("timm_dinov3", "timm_eva02", "dinov3", "siglip")),
    ],
)
def test_cuda_graphs_say_what_the_model_says(name: str, spec: str, pixels: Tensor) -> None:
    student = student_for(name, spec, pixels).to("cuda")
    images = pixels.to("cuda")
    for offset in (0.0, 0.4):
        student.runtime.offset = offset
        found, expected = first(student.predict(images)), first(call(student.model, images))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert [replay is not None for _, replay in student._recorded.kept.values()] == [True, True]
