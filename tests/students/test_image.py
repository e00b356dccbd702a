"""Image models with routers: open students equal the teacher, skipping equals masks, and reported compute is real."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.execution.image_block import similar_lengths
from students.execution.patch_counts import PatchCounts
from students.families.image import call
from students.kernels.merging import match, merge
from students.sites import LINEAR_SITES
from tests.pico.image import BOTH, IMAGE, MODELS, SIZES, TIMM, make_tiny
from tests.pico.routers import draw_parameters

SPECS = {
    "block": (RouterSpec("layer", selection="quota", kv="drop"),),
    "block stays": (RouterSpec("layer", selection="quota", kv="drop", dropped="stay"),),
    "multiples of 4 stay": (RouterSpec("layer", selection="quota", multiple=4, kv="drop", dropped="stay"),),
    "odd blocks stay": (RouterSpec("layer", selection="quota", kv="drop", dropped="stay", blocks="odd"),),
    "block merges": (RouterSpec("layer", selection="quota", kv="drop", dropped="merge"),),
    "multiples of 4 merge": (RouterSpec("layer", selection="quota", multiple=4, kv="drop", dropped="merge"),),
    "multiples of 4 stay adaptively": (RouterSpec("layer", multiple=4, kv="drop", dropped="stay"),),
    "multiples of 4 merge adaptively": (RouterSpec("layer", multiple=4, kv="drop", dropped="merge"),),
    "odd blocks merge adaptively": (RouterSpec("layer", kv="drop", dropped="merge", blocks="odd"),),
    "block adaptive": (RouterSpec("layer", kv="drop"),),
    "block adaptive stays": (RouterSpec("layer", kv="drop", dropped="stay", network="mlp"),),
    "block top-k weighted": (RouterSpec("layer", selection="topk", weight="score", kv="drop", blocks="odd"),),
    "branches": (RouterSpec("token", selection="quota", kv="drop"),),
    "branches adaptive": (RouterSpec("token", kv="drop", substitute=4),),
    "heads and experts": (RouterSpec("head"), RouterSpec("expert", groups=4)),
    "fixed heads and experts": (RouterSpec("head", network="static"), RouterSpec("expert", network="static", groups=4)),
    "all": (
        RouterSpec("layer", selection="quota", kv="drop", dropped="stay"),
        RouterSpec("head"),
        RouterSpec("expert", groups=4),
    ),
}

COMBINED = ["block merges", "multiples of 4 stay", "branches adaptive", "fixed heads and experts", "all"]
"""Specifications that between them route every part of a model in every way: all models are tested with them."""
MATRIX = [(name, spec) for name in MODELS for spec in SPECS if name in BOTH or spec in COMBINED]
PLACES = {case: [*MODELS].index(case[0]) + [*SPECS].index(case[1]) for case in MATRIX}
HALF = [case for case in MATRIX if case[0] == "timm_fused" or PLACES[case] % 2]
"""Half of the matrix, like one colour of a chessboard, with every model and every specification, and timm_fused with
all: for tests that say in part what `test_skipping_says_what_masks_say` says of the whole."""
COUNTED = ["vit", "clip", "timm_registers", "timm_eva02", "timm_dinov3"]
FEWER = [(name, spec) for name, spec in MATRIX if name == "timm_fused" or (name in COUNTED and spec in COMBINED)]


def bias_of(student: Student, key: str) -> str:
    """Return the parameter name of the bias of the router whose decisions have this key."""
    number, *branch, kind = key.split(".")
    place = ".".join([student.record.blocks, number])
    if branch:
        module = getattr(student.record, branch[0])
        place = f"{place}.base_layer.{module}" if student.spec.find("layer") else f"{place}.{module}"
    name = f"{place}.routers.{kind}.linear.bias"
    return next((n for n in student.added_parameters() if n.endswith(name)), name)


def routed(name: str, spec: str, pixels: Tensor) -> Student:
    """Return a student with random routers, of whose gates some are open and some closed."""
    sites = LINEAR_SITES[1:] if name == "timm_eva02" else LINEAR_SITES
    student = elasticize(make_tiny(name), StudentSpec(SPECS[spec], LoraSpec(2 if spec == "branches" else 0, sites)))
    draw_parameters(student, 0.3)
    student.runtime.execution, student.runtime.training = "mask", True
    for number in range(3):  # centre the scores block by block, as each block's depend on those before
        with torch.no_grad():
            _, decisions = student(pixels)
            for key, score in decisions.score.items():
                if key.startswith(str(number)):
                    bias = student.added_parameters().get(bias_of(student, key))
                    if bias is not None:
                        bias -= score.flatten(0, 1).median(0).values - 0.01 * (number + 1)  # no ties
    student.runtime.execution, student.runtime.training = "skip", False
    student.set_quotas([pixels])
    student.runtime.capacity = 0.5
    return student


def outputs(student: Student, pixels: Tensor) -> list[Tensor]:
    with torch.no_grad():
        features, _ = student.features(pixels)
    return [x for x in (features.logits, features.pooled) if x is not None]


def flops(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("execution", ["skip", "mask"])
def test_with_all_gates_open_the_student_is_the_teacher(name: str, execution: str, pixels: Tensor) -> None:
    expected = make_tiny(name).requires_grad_(False)  # requires_grad can change the order of sums
    student = elasticize(make_tiny(name), StudentSpec(SPECS["all"]))
    student.runtime.execution = execution
    with torch.no_grad():
        want, (got, _) = call(expected, pixels), student(pixels)
        want, got = (x if isinstance(x, Tensor) else x[0] for x in (want, got))
        assert torch.equal(got, want)
        with student.teacher():
            again = student(pixels)[0]
        assert torch.equal(again if isinstance(again, Tensor) else again[0], want)


@pytest.mark.parametrize(
    ("operators", "name", "spec"),
    [*(("c", *case) for case in MATRIX), *(("reference", *case) for case in MATRIX if "timm_fused" in case)],
    indirect=["operators"],
)
def test_skipping_says_what_masks_say(name: str, spec: str, pixels: Tensor, operators: None) -> None:
    student = routed(name, spec, pixels)
    skipped = outputs(student, pixels)
    with student.teacher():
        dense = outputs(student, pixels)
    student.runtime.execution = "mask"
    for one, other, teacher in zip(skipped, outputs(student, pixels), dense, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(one, teacher, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("execution", ["skip", "mask"])
@pytest.mark.parametrize("name", ["vit", "timm_fused", "timm_plain", "timm_registers"])
def test_merging_patches_that_are_the_same_loses_nothing(name: str, execution: str, operators: None) -> None:
    """A patch merged with an identical one counts as two keys, so that attention of all tokens stays the same."""
    student = elasticize(
        make_tiny(name), StudentSpec((RouterSpec("layer", kv="drop", dropped="merge", blocks="even"),))
    )
    block, prefix = student.blocks[0], student.record.prefix
    width = block.routers["layer"].linear.in_features
    x = torch.randn(2, prefix + 8, width, generator=torch.Generator().manual_seed(0))
    x[:, prefix + 1 :: 2] = x[:, prefix::2]
    kept = [*range(prefix), *range(prefix + 1, prefix + 8, 2)]
    with torch.no_grad():
        block.routers["layer"].linear.bias.fill_(-100)
        student.runtime.execution = execution
        out, dense = block(x), block.base_layer(x)
    out = out if execution == "skip" else out[:, kept]
    torch.testing.assert_close(out, dense[:, kept], rtol=1e-4, atol=1e-4)


def test_merged_tokens_are_means_of_what_they_stand_for() -> None:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))

    def take_in(x: Tensor, size: Tensor | None, pairs: list[dict[int, int]]) -> tuple[Tensor, Tensor]:
        target, leaving = torch.arange(6).repeat(2, 1), torch.zeros(2, 6)
        for row, moves in enumerate(pairs):
            for goes, where in moves.items():
                target[row, goes], leaving[row, goes] = where, 1
        return merge(x, size, leaving, target)

    once, size = take_in(x, None, [{0: 1, 2: 1}, {2: 3, 4: 5}])
    assert size.tolist() == [[1, 3, 1, 1, 1, 1], [1, 1, 1, 2, 1, 2]]
    torch.testing.assert_close(once[0, 1], x[0, :3].mean(0))
    torch.testing.assert_close(once[1, 5], x[1, 4:].mean(0))
    untouched = torch.tensor([[0, 2, 3, 4, 5], [0, 1, 2, 4, 0]])
    for row, places in enumerate(untouched):
        assert torch.equal(once[row, places], x[row, places])
    twice, size = take_in(once, size, [{1: 5}, {3: 1}])
    torch.testing.assert_close(twice[0, 5], x[0, [0, 1, 2, 5]].mean(0))
    torch.testing.assert_close(twice[1, 1], x[1, [1, 2, 3]].mean(0))
    assert size[:, [5, 1]].diagonal().tolist() == [4, 3]


def test_images_of_about_the_same_length_run_together() -> None:
    assert similar_lengths([8, 24, 8, 24], price=100) == [[0, 2, 1, 3]]
    assert similar_lengths([8, 24, 8, 24], price=30) == [[1, 3], [0, 2]]
    assert similar_lengths([8, 24, 9, 16], price=3) == [[1], [3], [0, 2]]
    assert similar_lengths([5, 5, 5], price=0) == [[0, 1, 2]]


def test_partners_are_the_most_alike_of_the_others_that_are_here() -> None:
    noise = torch.randn(1, 7, 7, generator=torch.Generator().manual_seed(0))
    x = torch.eye(7)[None, [0, 1, 2, 3, 1, 2, 1]] + 0.01 * noise  # a prefix token and six patches
    found = match(x, 1)
    assert found.may_go[0].tolist() == [False, True, False, True, False, True, False]
    assert found.target[0, 1] in (4, 6) and found.target[0, 5] == 2
    assert found.distance[0, 5] < found.distance[0, 3]  # no patch is like token 3
    here = torch.tensor([[True, True, False, True, True, True, True]])
    found = match(x, 1, here)
    assert found.may_go[0].tolist() == [False, True, False, False, True, False, True]
    assert set(found.target[0, [1, 4, 6]].tolist()) <= {3, 5}
    assert not match(x[:, :2], 1).may_go.any()
    found = match(x, 1, every=True)
    assert found.target[0, [2, 5]].tolist() == [5, 2] and found.target[0, 1] in (4, 6)


@pytest.mark.parametrize("dropped", ["return", "stay"])
def test_parts_of_images_of_several_lengths_have_their_own_budgets(dropped: str, pixels: Tensor) -> None:
    student = elasticize(
        make_tiny("vit"), StudentSpec((RouterSpec("layer", kv="drop", dropped=dropped), RouterSpec("head")))
    )
    draw_parameters(student, 0.3)
    student.runtime.offset = (1.0, -0.5, 0.2)
    skipped = outputs(student, pixels)
    student.runtime.execution = "mask"
    torch.testing.assert_close(skipped, outputs(student, pixels), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "spec"), [case for case in FEWER if case in HALF])
def test_batch_mates_change_nothing(name: str, spec: str, pixels: Tensor) -> None:
    student = routed(name, spec, pixels)
    together = outputs(student, pixels)
    alone = [torch.cat(parts) for parts in zip(*(outputs(student, x[None]) for x in pixels), strict=True)]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "spec"), FEWER)
def test_reported_compute_is_what_torch_counts(name: str, spec: str, pixels: Tensor) -> None:
    student = routed(name, spec, pixels)
    with student.teacher():
        dense = flops(lambda: student(pixels[:1]))
    with torch.no_grad():
        _, decisions = student(pixels[:1])
    valid = torch.ones(1, student.tokens, dtype=torch.bool)
    reported = float(student.compute.ratio(decisions, valid, "prefill"))
    counted = flops(lambda: student(pixels[:1])) / dense
    assert reported == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("spec", [name for name, routers in SPECS.items() if {r.kind for r in routers} == {"layer"}])
def test_blocks_of_several_attentions_are_skipped_as_a_whole(spec: str, pixels: Tensor) -> None:
    test_skipping_says_what_masks_say("parallel", spec, pixels, None)
    test_batch_mates_change_nothing("parallel", spec, pixels)
    test_reported_compute_is_what_torch_counts("parallel", spec, pixels)
    student = elasticize(make_tiny("parallel"), StudentSpec(SPECS[spec]))
    with torch.no_grad():
        expected = make_tiny("parallel").requires_grad_(False)(pixels)
        with student.teacher():
            assert torch.equal(student(pixels)[0], expected)
        if SPECS[spec][0].weight != "score":
            assert torch.equal(student(pixels)[0], expected)


@pytest.mark.parametrize("spec", ["branches", "heads and experts", "all"])
def test_branches_that_stand_side_by_side_take_no_routers(spec: str) -> None:
    with pytest.raises(ValueError, match="several attentions and MLPs side by side: it takes layer routers"):
        elasticize(make_tiny("parallel"), StudentSpec(SPECS[spec]))


@pytest.mark.parametrize(
    ("name", "spec", "problem"),
    [
        ("vit", StudentSpec((RouterSpec("channel", network="static"),)), "saves where tokens are decoded"),
        (
            "vit",
            StudentSpec((RouterSpec("layer", kv="drop"), RouterSpec("head", granularity="sequence"))),
            "decides token by token",
        ),
        ("timm_eva02", StudentSpec((RouterSpec("head"),), LoraSpec(2)), "no low-rank corrections there"),
    ],
)
def test_what_an_image_model_does_not_take(name: str, spec: StudentSpec, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        elasticize(make_tiny(name), spec)


def test_a_hybrids_images_have_the_channels_of_its_backbone() -> None:
    model = timm.create_model("vit_tiny_r_s16_p8_224", **{**TIMM, "patch_size": 1, "img_size": 64})
    student = elasticize(model.eval(), StudentSpec(SPECS["block merges"]))
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with student.teacher():
        dense = flops(lambda: student(pixels[:1]))
    _, whole = student.spent(pixels[:1], student(pixels[:1])[1])
    assert float(whole) == pytest.approx(dense / 2, rel=0.01)


OTHER_SIZES = {
    "vit": (24, 16),
    "deit": (24, 24),
    "dinov2": (12, 20),
    "clip": (24, 16),
    "siglip": (8, 24),
    "dinov3": (12, 20),
    "vit_mae": (24, 16),
}


@pytest.mark.parametrize("spec", ["block merges", "branches", "heads and experts"])
@pytest.mark.parametrize("name", OTHER_SIZES)
def test_images_of_another_size_than_configured(name: str, spec: str) -> None:
    """Positions are interpolated, and compute counts the tokens of the given size."""
    height, width = OTHER_SIZES[name]
    pixels = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        frozen = call(make_tiny(name).requires_grad_(False), pixels)
    student = routed(name, spec, pixels)
    assert student.at((height, width))[0] == height * width // 16 + student.record.prefix
    with torch.no_grad(), student.teacher():
        for one, other in zip(frozen.to_tuple(), call(student.model, pixels).to_tuple(), strict=True):
            assert torch.equal(one, other)
    with student.teacher():
        dense = flops(lambda: student(pixels[:1]))
    with torch.no_grad():
        _, decisions = student(pixels[:1])
    spent, whole = student.spent(pixels[:1], decisions)
    assert float(whole) == pytest.approx(dense / 2, rel=0.01)
    assert float(spent / whole) == pytest.approx(flops(lambda: student(pixels[:1])) / dense, rel=0.01)
    with torch.no_grad():
        skipped = student(pixels)[0].to_tuple()
        student.runtime.execution = "mask"
        torch.testing.assert_close(skipped, student(pixels)[0].to_tuple(), rtol=1e-3, atol=1e-3)


def test_a_size_that_a_model_cannot_take_costs_one_line() -> None:
    student = elasticize(make_tiny("timm_fused"), StudentSpec(SPECS["block"]))
    with pytest.raises(
        ValueError, match=r"VisionTransformer cannot take images of 24 x 24; .* configured for 16 x 16: "
    ):
        student.at((24, 24))
    assert not student.runtime.bypass


@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_an_oblong_mae_sees_all_patches(size: tuple[int, int]) -> None:
    config = transformers.ViTMAEConfig(**SIZES, **{**IMAGE, "image_size": size}, mask_ratio=0.0)
    student = elasticize(transformers.ViTMAEModel(config).eval(), StudentSpec(SPECS["block merges"]))
    assert student.tokens == 65
    with torch.no_grad():
        assert student(torch.randn(2, 3, *size))[0].last_hidden_state.shape == (2, 65, 32)


@pytest.mark.parametrize(("size", "multiple"), [(28, 4), (56, 32)])
def test_a_multiple_suits_the_number_of_tokens(size: int, multiple: int) -> None:
    model = timm.models.VisionTransformer(size, 4, embed_dim=8, depth=2, num_heads=2, num_classes=3).eval()
    spec = RouterSpec("layer", selection="quota", multiple=0, kv="drop", dropped="merge")
    student = elasticize(model.requires_grad_(False), StudentSpec((spec,)))
    assert (student.tokens, student.runtime.patch_counts(spec).multiple) == ((size // 4) ** 2 + 1, multiple)


def test_of_an_odd_number_of_patches_the_larger_half_may_leave() -> None:
    assert PatchCounts(prefix=1, multiple=32, merges=True).after([0.0], 196, [(0.0, 127)]) == [63]


def test_any_number_of_patches_is_kept_where_multiples_are_too_coarse(pixels: Tensor) -> None:
    student = routed("vit", "multiples of 4 merge", pixels)
    counts = {}
    for multiples in (None, 1):
        student.runtime.multiples = multiples
        counts[multiples] = set()
        for offset in torch.linspace(-2, 2, 40).tolist():
            student.runtime.offset = offset
            with torch.no_grad():
                counts[multiples].add(int(student(pixels)[1].share["0.layer"][0].sum()))
    assert counts[None] <= {9, 12, 16, 17} and len(counts[1]) > len(counts[None])


@pytest.mark.parametrize(
    "spec", ["block", "odd blocks stay", "multiples of 4 stay", "block merges", "multiples of 4 merge"]
)
def test_where_as_many_patches_pass_images_cost_as_much(spec: str, pixels: Tensor) -> None:
    student = routed("vit", spec, pixels)
    costs: dict[tuple[int, ...], set[float]] = {}
    for offset in torch.linspace(-2, 2, 40).tolist():
        student.runtime.offset = offset
        with torch.no_grad():
            _, decisions = student(pixels)
        passing = student.passing(pixels.shape[-2:])
        for place, count in enumerate(passing):
            if f"{place}.layer" in decisions.spec:
                assert (decisions.share[f"{place}.layer"].sum(1) == count + student.runtime.prefix).all()
        costs.setdefault(passing, set()).update(student.spent(pixels, decisions)[0].round().tolist())
    assert student.by_count and len(costs) > 2
    assert all(len(cost) == 1 for cost in costs.values())
