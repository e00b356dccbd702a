"""Prefill on devices that the host runs ahead of: the host waits rarely, and skipping gives the logits of masks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from elastic.accounting.counters import count
from students import LoraSpec, RouterSpec, Student, StudentSpec
from students.execution import tokens as some_tokens
from students.execution.linear import RoutedLinear
from students.kernels import devices, first_rows, ops
from students.kernels.capture import Fetched
from students.libraries import cache_of
from students.sites import BRANCHES
from tests.students.host_waits import Launches
from tests.students.test_execution import (
    CLOSE,
    ODD,
    SPECS,
    assert_decodes_in_one_pass,
    assert_mask_is_skip,
    decode,
    in_both_ways,
    make,
)
from tests.students.test_packing import add_corrections
from tests.students.test_students import left_over

SKIPPING = [name for name, spec in SPECS.items() if spec.find("token") or spec.find("layer")]


@pytest.fixture(autouse=True)
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Treat every device as one that the host runs ahead of, with products over the first rows that do not wait."""
    monkeypatch.setattr(devices, "runs_ahead", lambda device: True)
    possible = first_rows.possible

    def here(x: Tensor, outputs: int) -> bool:
        return possible(x, outputs) or (x.is_cpu and x.shape[-1] % 4 == 0 == outputs % 4)

    monkeypatch.setattr(first_rows, "possible", here)
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("name", "kind"), [case for case in ODD if case[1] in SKIPPING])
def test_mask_is_skip(name: str, kind: str, tokens: Tensor, padding: Tensor) -> None:
    student = make(name, SPECS[kind])
    for batch in (tokens, tokens[:1], tokens[:1, :1], tokens.view(4, 6)):
        torch.testing.assert_close(*in_both_ways(student, batch), **CLOSE)
        assert not left_over(student)
    assert_mask_is_skip(student, tokens, padding)


@pytest.mark.parametrize("spec", [StudentSpec((RouterSpec("channel"),)), StudentSpec((RouterSpec("token"),))])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "gpt_neox"])
def test_padded_prompts_attend_without_a_mask(
    name: str, spec: StudentSpec, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, masks, padding = make(name, spec), [], torch.ones_like(tokens)
    padding[0, :7] = 0  # more padding than gemma3's window of 6
    positions = (padding.cumsum(1) - 1).clamp(min=0)
    attend = F.scaled_dot_product_attention

    def watched(*args: object, attn_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        masks.append(attn_mask)
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    assert_mask_is_skip(student, tokens, padding, position_ids=positions)
    sees_all = [shape.window is None for shape in student.compute.blocks]
    assert [mask is None for mask in masks] == [False] * len(sees_all) + sees_all
    with student.teacher():
        student(tokens, padding, position_ids=positions)
    assert not any(mask is None for mask in masks[-len(sees_all) :]), "the model's own bits"
    part = slice(7, None)
    whole = decode(student, tokens[:, part], None, 3)[0]
    torch.testing.assert_close(decode(student, tokens, padding, 10)[0, part], whole, **CLOSE)


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("llama", kind) for kind in SKIPPING), *zip(["mistral", "gpt_neox"] * 8, SKIPPING, strict=True)],
)
def test_cached_decoding_is_one_forward_pass(name: str, kind: str, tokens: Tensor) -> None:
    assert_decodes_in_one_pass(make(name, SPECS[kind]), tokens)


@pytest.mark.parametrize("kind", SKIPPING)
def test_a_prompt_is_read_in_parts(kind: str, tokens: Tensor) -> None:
    student = make("llama", SPECS[kind])
    prompt = torch.zeros_like(tokens, dtype=torch.bool)
    prompt[:, :5] = True
    student.runtime.execution = "mask"
    whole = student(tokens, prompt=prompt)[0].logits
    student.runtime.execution, cache, parts = "skip", None, []
    for part in (tokens[:, :5], tokens[:, 5:9], tokens[:, 9:]):
        out, _ = student(part, use_cache=True, past_key_values=cache)
        cache, parts = cache_of(out), [*parts, out.logits]
    torch.testing.assert_close(whole, torch.cat(parts, 1), **CLOSE)


@pytest.mark.parametrize("kind", SKIPPING)
def test_rows_with_budgets_of_their_own(kind: str, tokens: Tensor) -> None:
    if any(router.selection == "topk" for router in SPECS[kind].routers):
        pytest.skip("one budget for all rows")
    student = make("llama", SPECS[kind])
    student.runtime.offset = (0.3, torch.inf)
    torch.testing.assert_close(*in_both_ways(student, tokens), **CLOSE)


def of_blocks(student: Student, *args: object, **kwargs: object) -> tuple[list[int], list[dict[str, int]]]:
    """Return, for each block in a forward pass, its number of waits and its launches by operator."""
    counter, waits, launches, hooks = Launches(), [], [], []

    def enter(*_: object) -> None:
        waits.append(-len(counter.waits))
        launches.append(counter.launched.copy())

    def leave(module: nn.Module, *_: object) -> None:
        waits[-1] += len(counter.waits)
        launches[-1] = counter.launched - launches[-1]

    for block in student.blocks:
        hooks += [block.register_forward_pre_hook(enter, prepend=True), block.register_forward_hook(leave)]
    with counter:
        student.model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    return waits, launches


DROPPED = StudentSpec((RouterSpec("layer", kv="drop"),))
KEPT = StudentSpec((RouterSpec("token", sites=("mlp",)),))
BOTH = StudentSpec((RouterSpec("token"),))
CORRECTED = StudentSpec((RouterSpec("token", substitute=2),), LoraSpec(2))
WEIGHTED = StudentSpec((RouterSpec("token", substitute=2, weight="score"),))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("spec", [DROPPED, KEPT, BOTH, CORRECTED])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_host_waits_once_a_block(name: str, spec: StudentSpec, rows: int, tokens: Tensor) -> None:
    student = make(name, spec)
    student.model(tokens[:rows], use_cache=True)
    waits, _ = of_blocks(student, tokens[:rows], use_cache=True)
    assert waits == [1] * len(student.blocks)


@pytest.mark.parametrize("kind", SKIPPING)
def test_where_products_wait_for_their_number_the_host_waits_twice(
    kind: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without products over a number of rows that only the device knows, the host waits twice a block."""
    monkeypatch.setattr(first_rows, "possible", lambda x, outputs: False)
    torch.testing.assert_close(*in_both_ways(make("llama", SPECS[kind]), tokens), **CLOSE)
    student = make("llama", BOTH)
    student.model(tokens, use_cache=True)
    assert of_blocks(student, tokens, use_cache=True)[0] == [2] * len(student.blocks)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_products_over_the_first_rows(device: str) -> None:
    x, weight, bias = (torch.randn(shape, device=device).bfloat16() for shape in ((300, 256), (512, 256), (512,)))
    number = torch.tensor([137], dtype=torch.int32, device=device)
    if not first_rows.possible(x, 512):
        pytest.skip("this GPU asks the host")
    if x.is_cuda:
        torch.cuda.set_sync_debug_mode("error")
    outs = [first_rows.linear(x, weight, added, number) for added in (None, bias)]
    if x.is_cuda:
        torch.cuda.set_sync_debug_mode("default")
    for out, added in zip(outs, (None, bias), strict=True):
        torch.testing.assert_close(out[:137], F.linear(x[:137], weight, added), atol=0.3, rtol=0.05)


@pytest.mark.parametrize(("spec", "filled"), [(BOTH, 0), (WEIGHTED, 2), (CORRECTED, 0)])
def test_substitutes_run_while_the_host_waits(
    spec: StudentSpec, filled: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scores are weights: elsewhere substitutes begin with the scores, and end in the block's last launch."""
    student, counter, between = make("llama", spec), Launches(), []

    class Asked(Fetched):
        def __init__(self, tensor: Tensor) -> None:
            super().__init__(tensor)
            self.since = products(counter)

        def wait(self) -> Tensor:
            between.append(products(counter) - self.since)
            return super().wait()

    monkeypatch.setattr(some_tokens, "Fetched", Asked)
    with counter:
        student.model(tokens, use_cache=True)
    assert between == [filled] * len(student.blocks)


def test_a_branch_decides_in_three_launches_and_ends_in_one(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """One product for scores and substitute, the decision, and the list of open tokens; then one launch puts outputs
    and substitutes in their places on the residual stream. An MLP's gated product is one launch, too."""
    routers = (RouterSpec("token", network="mlp", substitute=2, prefix=2),)
    student = make("llama", StudentSpec(routers))
    given = student.model(tokens, use_cache=True).logits
    monkeypatch.setattr(ops, "compiled", lambda x: True)
    _, launches = of_blocks(student, tokens, use_cache=True)
    for block in launches:
        for name in ("open_by_score", "list_open", "substitute_closed"):
            assert block[f"elastic.{name}.default"] == 2, name
        assert block["elastic.fused_gate.default"] == 1 and block["aten.addmm.default"] == 2
        assert not block.keys() & {"aten.silu.default", "aten.addcmul_.default"}
        assert (block["aten.add.Tensor"], block["aten.mul.Tensor"]) == (2, 4), "those of the two norms"
    torch.testing.assert_close(student.model(tokens, use_cache=True).logits, given, **CLOSE)


@pytest.mark.parametrize(("spec", "norm"), [(DROPPED, 6), (KEPT, 0), (BOTH, 0), (CORRECTED, 0)])
def test_products_follow_what_the_host_waits_for(
    spec: StudentSpec, norm: int, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the host has waited, the next matrix product is launched at once, or after the norm of a block that runs on
    fewer tokens (six operators where the norm is not fused)."""
    student, counter, ends, between = make("llama", spec), Launches(), [], []

    class Asked(Fetched):
        def wait(self) -> Tensor:
            ends.append(sum(counter.launched.values()))
            return super().wait()

    def enter(*_: object) -> None:
        if ends:
            between.append(sum(counter.launched.values()) - ends.pop())

    monkeypatch.setattr(some_tokens, "Fetched", Asked)
    for module in student.model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(enter)
    with counter:
        student.model(tokens, use_cache=True)
    assert between == [norm] * len(student.blocks)


@pytest.mark.parametrize("spec", [BOTH, StudentSpec((RouterSpec("token", substitute=2),))])
def test_what_is_counted_is_what_is_reported_and_what_nobody_waits_for(spec: StudentSpec, tokens: Tensor) -> None:
    student = make("llama", spec)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    _, decisions = student(tokens)
    extra = torch.zeros(())
    for number, block in enumerate(student.compute.blocks):
        shares = {branch: decisions.share[f"{number}.{branch}.token"] for branch in BRANCHES}
        extra = extra + ((1 - shares["attn"]) * block.per_key * tokens.shape[1]).sum()
        for branch, macs in block.substitutes.items():
            extra = extra + (shares[branch.partition(".")[0]] * macs).sum()
    head = student.compute.head * valid.sum()
    reported = student.compute.routed_blocks(decisions, valid, "prefill").sum() + head
    with sdpa_kernel(SDPBackend.MATH):  # computes all scores, also masked ones
        flops, _ = count(lambda: student(tokens))
    assert float(extra) > 0
    assert 2 * float(reported + extra) == pytest.approx(flops, rel=0.002)


def products(counter: Launches) -> int:
    return sum(count for name, count in counter.launched.items() if "mm" in name)


@pytest.mark.parametrize(("name", "grouped"), [("llama", True), ("llama", False), ("gpt2", True)])
def test_corrections_that_are_added_to_weights_take_no_products(
    name: str, grouped: bool, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not grouped:
        monkeypatch.setattr(first_rows, "possible", lambda x, outputs: False)
    student = make(name, CORRECTED)
    apart = student.model(tokens).logits
    add_corrections(student)
    monkeypatch.setattr(RoutedLinear, "_correct", None)
    torch.testing.assert_close(student.model(tokens).logits, apart, **CLOSE)


def test_no_row_and_no_query_is_launched_for_alone() -> None:
    """The number of launches depends neither on the number of rows nor on their length."""
    for spec in (DROPPED, KEPT, BOTH, CORRECTED):
        student = make("llama", spec, max_position_embeddings=600)
        launches = []
        for shape in ((2, 300), (4, 600)):
            ids = torch.randint(3, 120, shape, generator=torch.Generator().manual_seed(0))
            student.model(ids, use_cache=True)
            launches.append([dict(block) for block in of_blocks(student, ids, use_cache=True)[1]])
        assert launches[0] == launches[1]


def test_no_length_that_a_text_decides_is_planned_for(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's attention, which plans anew for each shape, is off where the text decides the number of keys."""
    planned: list[bool] = []
    attend, plans = F.scaled_dot_product_attention, torch.backends.cuda.cudnn_sdp_enabled

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        planned.append(plans())
        return attend(*args, **kwargs)

    def plan(work: Callable[..., Any], *args: Any) -> set[bool]:
        planned.clear()
        work(*args)
        assert plans(), "for others it is as it was"
        return {*planned}

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    for spec, expected in ((DROPPED, {False}), (KEPT, {True})):
        student = make("llama", spec)
        assert plan(student, tokens) == expected
        assert plan(decode, student, tokens, None, tokens.shape[1] - 1) == expected | {False}
        student.runtime.execution = "mask"
        assert plan(student, tokens) == {True}
        with student.teacher():
            assert plan(student, tokens) == {True}
    student.runtime.execution, student.blocks[-1].mlp.forward = "skip", None
    with pytest.raises(TypeError):
        student(tokens[:, :1])
    assert plans()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [DROPPED, KEPT, BOTH, CORRECTED])
def test_on_a_gpu_blocks_wait_for_nothing_but_what_they_ask(spec: StudentSpec, tokens: Tensor) -> None:
    student = make("llama", spec).to("cuda")
    for batch in (tokens.cuda(), tokens[:1].cuda(), None):
        if batch is None:  # products over the first rows exist for bfloat16
            student, batch = student.bfloat16(), tokens.cuda()
            student.model(batch)  # runs the trials of the kernels
        else:
            torch.testing.assert_close(*in_both_ways(student, batch), **CLOSE)
        hooks = []
        for block in student.blocks:
            enter = block.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"), prepend=True)
            leave = block.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"), always_call=True)
            hooks += [enter, leave]
        out = student.model(batch, use_cache=True)  # `Fetched` waits for an event, which is no error
        assert bool(out.logits.isfinite().all())
        for hook in hooks:
            hook.remove()
