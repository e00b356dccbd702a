"""Invariants of distances between hidden states, and of losses on routers' decisions."""

import math

import pytest
import torch

from losses import HIDDEN_DISTANCES, budget_price, budget_prices, capacity_hinge, load_balance, per_layer, topk_bce


@pytest.mark.parametrize("name", HIDDEN_DISTANCES)
def test_hidden_distances_vanish_at_equality_and_ignore_masked_positions(name: str) -> None:
    distance = HIDDEN_DISTANCES[name]
    student, teacher = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    student.requires_grad_()
    torch.testing.assert_close(distance(teacher, teacher, None), torch.zeros((), dtype=torch.float64))
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    value = distance(student, teacher, mask)
    (gradient,) = torch.autograd.grad(value, student)
    assert value > 0
    assert (gradient[~mask] == 0).all()
    with torch.no_grad():
        student[~mask] = math.nan
    torch.testing.assert_close(distance(student, teacher, mask), value)
    assert distance(student, teacher, torch.zeros_like(mask)) == 0
    torch.testing.assert_close(per_layer(distance, [student, teacher], [teacher, teacher], mask), value / 2)


def test_hidden_distances_have_the_units_they_claim() -> None:
    teacher = torch.randn(2, 5, 8, dtype=torch.float64)
    cosine, mse, relative = HIDDEN_DISTANCES.values()
    torch.testing.assert_close(cosine(-3 * teacher, teacher, None).item(), 2.0)
    torch.testing.assert_close(mse(teacher + 3, teacher, None).item(), 9.0)
    torch.testing.assert_close(relative(torch.zeros_like(teacher), teacher, None).item(), 1.0)
    torch.testing.assert_close(relative(2 * teacher, teacher, None), relative(200 * teacher, 100 * teacher, None))
    assert mse(*torch.randn(2, 2, 5, 8).bfloat16()).dtype == torch.float32


def test_budget_price_rises_while_the_budget_is_exceeded_and_is_never_negative() -> None:
    multiplier = torch.tensor(1.0)
    price, after = budget_price(multiplier, torch.tensor(0.8), 0.7, stiffness=10)
    assert price > multiplier and after > multiplier
    price, after = budget_price(multiplier, torch.tensor(0.6), 0.7, stiffness=10)
    assert price < multiplier and after < multiplier
    price, after = budget_price(multiplier, torch.tensor(0.7), 0.7, stiffness=10)
    torch.testing.assert_close(price, multiplier)
    assert budget_price(multiplier, torch.tensor(0.1), 0.7, stiffness=99)[0] == 0


def test_prices_of_a_range_follow_each_budget_s_own_miss() -> None:
    prices, misses = torch.tensor([1e-4, 2.0, 3.0]), torch.tensor([0.1, 0.0, -0.1])
    found = budget_prices(prices, misses, stiffness=20) / prices
    torch.testing.assert_close(found, torch.tensor([math.exp(0.1), 1.0, math.exp(-0.1)]))


def test_capacity_hinge_judges_each_site() -> None:
    share = torch.tensor([0.9, 0.1], requires_grad=True)
    value = capacity_hinge(share, 0.5)
    value.backward()
    torch.testing.assert_close(value.item(), 0.2)
    assert share.grad.tolist() == [0.5, 0]


def test_load_balance_is_one_when_even_and_m_when_one_takes_all() -> None:
    eye = torch.eye(4)
    torch.testing.assert_close(load_balance(eye).item(), 1.0)
    torch.testing.assert_close(load_balance(torch.ones(3, 5, 4)).item(), 1.0)
    torch.testing.assert_close(load_balance(eye[:1].expand(6, 4)).item(), 4.0)
    assert load_balance(torch.zeros(6, 4)) == 0
    gates = torch.tensor([[[1.0, 0.0], [1.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]]])
    use = gates.flatten(0, 1).mean(0)
    torch.testing.assert_close(load_balance(gates), 1 + (use.std(correction=0) / use.mean()) ** 2)


def test_load_balance_takes_from_the_busy_and_gives_to_the_idle() -> None:
    gates = torch.tensor([1.0, 1.0, 0.25]).repeat(6, 1).requires_grad_()
    load_balance(gates).backward()
    assert (gates.grad[:, :2] > 0).all()
    assert (gates.grad[:, 2] < 0).all()


def test_topk_bce_raises_the_chosen_and_lowers_the_rest() -> None:
    scores = torch.tensor([[3.0, -1.0, 2.0, 0.5, 9.0], [0.1, 0.2, 0.3, 0.4, 0.5]], requires_grad=True)
    mask = torch.tensor([[True, True, True, True, False], [True] * 5])
    loss = topk_bce(scores, 0.5, mask)
    loss.backward()
    assert scores.grad.sign().tolist() == [[-1, 1, -1, 1, 0], [1, 1, -1, -1, -1]]
    settled = torch.where(scores.grad < 0, 30.0, -30.0)
    assert topk_bce(settled, 0.5, mask) < 1e-6
    assert topk_bce(scores, 0.5, torch.zeros_like(mask)) == 0


def test_topk_bce_chooses_exactly_k_among_equals() -> None:
    scores = torch.zeros(2, 8, requires_grad=True)
    topk_bce(scores, 0.25).backward()
    assert ((scores.grad < 0).sum(1) == 2).all()
