"""Vision-language students: image tokens that the router drops leave no trace in the language model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from elastic.accounting.counters import count
from students import RouterSpec, StudentSpec, elasticize
from students.execution.kv_cache import keys_and_values
from students.families.vision_language import VisionLanguageStudent
from students.libraries import cache_of
from tests.pico.routers import draw_parameters
from tests.pico.vision_language import ALIKE, CONFIGS, make_prompts, make_vlm

PRUNING = RouterSpec("image", selection="quota", network="mlp", query=4)
PER_KIND = {"idefics3": (1, 1), "smolvlm": (1, 1)}
"""Numbers of images in two rows, for classes that pad every row to the same number of images."""


def student_of(name: str, *routers: RouterSpec, keep: float | None = 0.5) -> VisionLanguageStudent:
    """Return a student with random routers that keep a share `keep` of image tokens; None: routers start open."""
    student = elasticize(make_vlm(name), StudentSpec(routers or (PRUNING,)))
    assert isinstance(student, VisionLanguageStudent)
    if keep is not None:
        draw_parameters(student, 0.5, seed=7)
        if student.image_router is not None and student.image_router.levels is not None:
            student.image_router.set_quota(torch.linspace(keep - 1, keep, 200))
    return student


def one(inputs: dict[str, Tensor], row: int) -> dict[str, Tensor]:
    """Return the inputs of a single row, without its padding, from a batch with one image per row."""
    rows, here = len(inputs["input_ids"]), inputs["attention_mask"][row].bool()
    text = {k: x[row : row + 1][:, here] for k, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    other = {k: x for k, x in inputs.items() if k not in text}
    if inputs.get("image_grid_thw") is None and other["pixel_values"].ndim == 5 and len(other["pixel_values"]) == 1:
        return {**text, "pixel_values": other["pixel_values"][:, row : row + 1]}
    return {**text, **{k: x.chunk(rows)[row] for k, x in other.items()}}


@pytest.fixture(params=sorted(CONFIGS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=sorted(set(CONFIGS) - set(ALIKE)))
def distinct(request: pytest.FixtureRequest) -> str:
    return request.param


@torch.no_grad()
def test_open_gates_change_nothing(name: str, operators: None) -> None:
    model = make_vlm(name).requires_grad_(False)  # requires_grad can change the order of sums
    inputs = make_prompts(model, PER_KIND.get(name, (2, 1)), left=True)
    expected = model(**inputs, output_hidden_states=True)
    said = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    student = elasticize(model, StudentSpec((PRUNING,)))
    out, decisions = student(**inputs, output_hidden_states=True)
    assert torch.equal(out.logits, expected.logits)
    assert all(torch.equal(one, other) for one, other in zip(out.hidden_states, expected.hidden_states, strict=True))
    assert bool((decisions.share["image"][inputs["attention_mask"].bool()] == 1).all())
    again = student.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(again, said)


@torch.no_grad()
def test_text_alone_runs_as_in_the_teacher(distinct: str) -> None:
    model = make_vlm(distinct)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids).logits
    assert torch.equal(student_of(distinct)(ids)[0].logits, expected)


@pytest.mark.parametrize("mixture", ["qwen3_vl_moe", "glm4v_moe"])
@torch.no_grad()
def test_experts_and_image_tokens_are_left_out_together(mixture: str) -> None:
    student = student_of(mixture, PRUNING, RouterSpec("mixture"), RouterSpec("token", sites=("mlp",)))
    for limit in (p for key, p in student.added_parameters().items() if key.endswith("mixture.log_limit")):
        limit.fill_(-1.1)  # of three weights that add up to one, some are below e^-1.1, some above
    inputs = make_prompts(student.model, (2, 1))
    out, decisions = student(**inputs)
    assert decisions.share["1.mlp.mixture"].unique().numel() > 2 and "0.mlp.mixture" not in decisions.share
    student.runtime.execution = "mask"
    rows = student(**inputs)[0].logits[torch.arange(2)[:, None], decisions.index]
    torch.testing.assert_close(out.logits[decisions.valid], rows[decisions.valid], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_leaving_out_is_hiding(name: str, left: bool) -> None:
    student = student_of(name)
    for images in {(1, 1), PER_KIND.get(name, (2, 1)), PER_KIND.get(name, (0, 1))}:
        inputs = make_prompts(student.model, images, left)
        out, decisions = student(**inputs)
        assert out.logits.shape[1] < inputs["input_ids"].shape[1]
        student.runtime.execution = "mask"
        whole, masked = student(**inputs)
        student.runtime.execution = "skip"
        assert torch.equal(decisions.share["image"], masked.share["image"])
        rows = whole.logits.gather(1, decisions.index.unsqueeze(-1).expand(-1, -1, whole.logits.shape[-1]))
        torch.testing.assert_close(out.logits[decisions.valid], rows[decisions.valid], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batch_mates_and_padding_change_nothing(distinct: str) -> None:
    student = student_of(distinct)
    inputs = make_prompts(student.model, (1, 1))
    together, decisions = student(**inputs)
    for row in range(2):
        alone, _ = student(**one(inputs, row))
        here = decisions.valid[row]
        torch.testing.assert_close(alone.logits[0], together.logits[row][here], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_decoding_with_a_cache_is_the_full_pass(name: str) -> None:
    student = student_of(name, keep=0.2)  # pruned tokens count where a window ends
    inputs = make_prompts(student.model, PER_KIND.get(name, (2, 1)), left=True)
    length = inputs["input_ids"].shape[1]
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    options["suppress_tokens"] = [student.model.config.image_token_id]  # a full pass would need an image for it
    out = student.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)
    held = keys_and_values(cache_of(out))[0][0].shape[2]
    assert held < length + 4  # the last of five new tokens is not cached
    grown = {**inputs, "input_ids": out.sequences[:, :-1]}
    for key, value in (
        ("attention_mask", 1),
        ("mm_token_type_ids", 0),
        ("token_type_ids", int(name.startswith("paligemma"))),
    ):
        if key in grown:
            grown[key] = torch.nn.functional.pad(grown[key], (0, 4), value=value)
    prompt = torch.nn.functional.pad(inputs["attention_mask"].bool(), (0, 4), value=False)
    full, _ = student(**grown, prompt=prompt)
    torch.testing.assert_close(torch.stack(out.logits, 1), full.logits[:, -5:], rtol=1e-3, atol=1e-3)
    student.runtime.execution = "mask"
    masked = student.generate(**inputs, **options)
    assert torch.equal(masked, out.sequences)


@torch.no_grad()
def test_rows_may_have_budgets_of_their_own(distinct: str) -> None:
    student = student_of(distinct)
    student.dial = ((0.2, -0.5), (0.99, 0.5))
    inputs = make_prompts(student.model, (1, 1), left=True)
    student.set_compute([0.5, 1.0])
    assert student.runtime.call.rows is None
    together, decisions = student(**inputs)
    kept = (decisions.share["image"] * (inputs["input_ids"] == 110)).sum(1) / (inputs["input_ids"] == 110).sum(1)
    assert kept[0] < 1 == kept[1]
    for row, budget in enumerate((0.5, 1.0)):
        student.set_compute(budget)
        alone, _ = student(**one(inputs, row))
        here = inputs["attention_mask"][row].bool() if decisions.index is None else decisions.valid[row]
        torch.testing.assert_close(alone.logits[0], together.logits[row][here], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_passes_can_be_counted_beforehand() -> None:
    student = student_of("llava")
    inputs = make_prompts(student.model, (2, 1))
    image, valid = inputs["input_ids"] == 110, inputs["attention_mask"].bool()
    assert student.by_count and not student_of("llava", PRUNING, RouterSpec("token", sites=("mlp",))).by_count
    _, decisions = student.features(**inputs)
    expected = student.spent(decisions, image, valid, 1)
    torch.testing.assert_close(expected, student.spent(student.passing(image, valid), image, valid, 1))


@torch.no_grad()
def test_searching_and_sampling_run(distinct: str) -> None:
    student = student_of(distinct)
    inputs = make_prompts(student.model, (1, 1), left=True)
    for options in (dict(num_beams=2, do_sample=False), dict(do_sample=True)):
        out = student.generate(**inputs, **options, max_new_tokens=4, min_new_tokens=4, pad_token_id=0)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 4


@torch.no_grad()
def test_reported_compute_is_what_torch_counts() -> None:
    every = (
        PRUNING,
        RouterSpec("token", sites=("mlp",)),
        RouterSpec("token", part="vision", kv="drop", sites=("mlp",)),
    )
    for routers in ((PRUNING,), every):
        student = student_of("llava", *routers)
        inputs = make_prompts(student.model, (1, 1, 1))
        _, decisions = student(**inputs)
        valid = inputs["attention_mask"].bool()
        each = decisions.valid.shape[1]
        macs, vision, dense = (x.sum() for x in student.spent(decisions, inputs["input_ids"] == 110, valid, each))
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            flops, _ = count(lambda student=student, inputs=inputs: student(**inputs))
        padding = 1 - float(decisions.valid.float().mean())
        assert 2 * float(macs) == pytest.approx(flops, rel=0.01 + padding)
        assert 0 < float(vision) < float(macs) < float(dense)


@torch.no_grad()
def test_routers_in_both_towers_leave_out_what_they_mask() -> None:
    routers = (
        PRUNING,
        RouterSpec("token", kv="drop", substitute=4),
        RouterSpec("head", selection="topk"),
        RouterSpec("token", part="vision", kv="drop"),
        RouterSpec("expert", part="vision", groups=4, selection="topk"),
    )
    student = student_of("llava", *routers)
    student.runtime.capacity = 0.5
    inputs = make_prompts(student.model, (2, 1))
    out, decisions = student(**inputs)
    assert {"image", "vision.0.attn.token", "vision.1.mlp.expert", "2.attn.head"} <= set(decisions.share)
    student.runtime.execution = "mask"
    whole, _ = student(**inputs)
    rows = whole.logits.gather(1, decisions.index.unsqueeze(-1).expand(-1, -1, whole.logits.shape[-1]))
    torch.testing.assert_close(out.logits[decisions.valid], rows[decisions.valid], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("images", [(1, 1), (2, 1)])
def test_image_tokens_that_stay_outside_have_no_say_in_decisions_on_sequences(images: tuple[int, int]) -> None:
    student = student_of("llava", PRUNING, RouterSpec("head", granularity="sequence"))
    inputs, scores = make_prompts(student.model, images), []
    for execution, grad in (("skip", False), ("mask", False), ("mask", True)):
        student.runtime.execution = execution
        with torch.set_grad_enabled(grad):
            scores.append(student(**inputs)[1].score["0.attn.head"])
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pruning", [(), (PRUNING,)])
def test_padding_has_no_say_in_decisions_on_sequences(pruning: tuple[RouterSpec, ...]) -> None:
    student = student_of("paligemma", *pruning, RouterSpec("head", granularity="sequence"), keep=1.0)
    inputs = make_prompts(student.model, (2, 1))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            together = student(**inputs)[1].score["0.attn.head"]
            last = {name: x[1:, : int(inputs["attention_mask"][1].sum())] for name, x in inputs.items()}
            alone = student(**{**last, "pixel_values": inputs["pixel_values"][2:]})[1].score["0.attn.head"]
        torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", ["quota", "threshold", "topk"])
def test_gradients_reach_the_image_router_and_nothing_else(selection: str) -> None:
    student = student_of("llava", RouterSpec("image", selection=selection, query=4)).train()
    student.runtime.capacity = 0.5
    inputs = make_prompts(student.model)
    out, decisions = student.features(**inputs)
    text = inputs["attention_mask"].bool() & (inputs["input_ids"] != 110)
    macs, *_ = student.spent(decisions, inputs["input_ids"] == 110, inputs["attention_mask"].bool(), 1)
    (out.last_hidden_state[text].square().mean() + macs.sum() / 1e6).backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in student.added_parameters().values())
    assert all(p.grad is None for p in student.model.parameters() if not p.requires_grad)


@torch.no_grad()
def test_the_question_changes_what_is_kept_only_with_a_query() -> None:
    for query, differs in ((4, True), (0, False)):
        student = student_of("llava", RouterSpec("image", selection="quota", query=query))
        inputs = make_prompts(student.model, (1, 1))
        inputs["pixel_values"] = inputs["pixel_values"][:1].repeat(2, 1, 1, 1)
        _, decisions = student(**inputs)
        image = inputs["input_ids"] == 110
        score = decisions.score["image"].squeeze(-1)
        kept = [decisions.share["image"][row][image[row]] for row in range(2)]
        scores = [score[row][image[row]] for row in range(2)]
        assert torch.allclose(*scores, atol=1e-4) != differs
        assert not torch.equal(*kept) if differs else torch.equal(*kept)


def test_what_does_not_fit_says_so() -> None:
    with pytest.raises(ValueError, match="fixed length"):
        student = student_of("llava")
        cache = StaticCache(student.trunk.config, max_cache_len=64)
        with torch.no_grad():
            student(**make_prompts(student.model), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="some are padded"), torch.no_grad():
        student, cache = student_of("llava"), DynamicCache()
        inputs = make_prompts(student.model, (1, 2))
        student(**inputs, past_key_values=cache, use_cache=True)
        del inputs["attention_mask"]
        student(**inputs, past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot stand in the vision tower"):
        elasticize(make_vlm("llava"), StudentSpec((RouterSpec("layer", part="vision", kv="drop"),)))
    with pytest.raises(ValueError, match="in both directions"):
        elasticize(make_vlm("paligemma"), StudentSpec((RouterSpec("layer", kv="drop"),)))
    with pytest.raises(ValueError, match="sliding windows"):
        elasticize(make_vlm("cohere2_vision"), StudentSpec((PRUNING, RouterSpec("layer", kv="drop"))))
    with pytest.raises(ValueError, match="not supported"):
        elasticize(make_vlm("qwen2_vl"), StudentSpec((RouterSpec("token", part="vision", kv="drop"),)))
