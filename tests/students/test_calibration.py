"""Calibration: its estimates of cost agree with measured KL, and its closed-form fits recover known maps."""

from __future__ import annotations

import pytest
import torch

from elastic.accounting.language import head_cost, measured_compute
from losses import forward_kl
from students import LoraSpec, RouterSpec, Student, StudentSpec, elasticize
from students.calibration.data_shard import DataShard
from students.calibration.fit import cluster_neurons, fit_substitute, fit_vocab, ridge
from students.calibration.image import calibrate_images, observe_images
from students.calibration.language import calibrate, observe, places
from students.calibration.observe import moments
from students.calibration.price import gated_choice
from students.routers import Router, Substitute
from tests.pico.image import make_tiny as make_image
from tests.pico.language import make_tiny


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def windows() -> torch.Tensor:
    """Token ids [16, 16]."""
    return torch.randint(3, 120, (16, 16), generator=torch.Generator().manual_seed(1))


def student_of(*routers: RouterSpec, name: str = "llama") -> Student:
    return elasticize(make_tiny(name), StudentSpec(routers, LoraSpec(0)))


def kl(student: Student, windows: torch.Tensor) -> float:
    """Return the mean forward KL between teacher and student, in nats per token."""
    with torch.no_grad():
        routed = student(windows, use_cache=False)[0].logits.flatten(0, 1)
        with student.teacher():
            exact = student(windows)[0].logits.flatten(0, 1)
    return float(forward_kl(routed, exact).mean())


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("target", [0.6, 0.8])
def test_channels_start_at_the_target(name: str, target: float, windows: torch.Tensor):
    student = student_of(RouterSpec("channel"), name=name)
    start = calibrate(student, windows.split(4), target, "decode")
    assert start.compute == pytest.approx(target, abs=0.01)
    assert measured_compute(student, windows, "decode", prompt=8) == pytest.approx(target, abs=0.03)


def test_offsets_of_a_start_reach_its_targets(windows: torch.Tensor):
    student, targets = student_of(RouterSpec("channel")), (0.6, 0.7, 0.85)
    start = calibrate(student, windows.split(4), targets, "decode")
    for target, student.runtime.offset in zip(targets, start.offsets, strict=True):
        assert measured_compute(student, windows, "decode", prompt=8) == pytest.approx(target, abs=0.03)


@pytest.mark.parametrize("router", [RouterSpec("token"), RouterSpec("vocab", rank=5)])
def test_the_cost_of_the_head_is_on_the_device_of_its_inputs(router: RouterSpec):
    student = student_of(router).to("meta")
    width = student.model.config.hidden_size
    for phase in ("prefill", "decode"):
        cost = head_cost(student, torch.empty(2, 3, width, device="meta"), phase)
        assert cost.is_meta and cost.shape == (2, 3)


@pytest.mark.parametrize(
    "router",
    [
        RouterSpec("token", substitute=4),
        RouterSpec("layer", substitute=4),
        RouterSpec("head"),
        RouterSpec("expert", groups=8),
        RouterSpec("expert", groups=8, grouping="coactivation"),
        RouterSpec("channel", network="static"),
        RouterSpec("neuron"),
        RouterSpec("expert", groups=24, network="static"),
    ],
    ids=str,
)
def test_every_kind_starts_near_the_target(router: RouterSpec, windows: torch.Tensor):
    student = student_of(router)
    start = calibrate(student, windows.split(4), 0.85, "decode")
    assert all(parameter.isfinite().all() for parameter in student.added_parameters().values())
    assert start.compute == pytest.approx(0.85, abs=0.05)
    assert measured_compute(student, windows, "decode", prompt=8) == pytest.approx(start.compute, abs=0.06)


def test_calibration_leaves_the_model_as_it_was(windows: torch.Tensor):
    student = student_of(RouterSpec("channel"), RouterSpec("vocab"))
    before = {name: p.clone() for name, p in student.model.named_parameters() if not p.requires_grad}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]
    calibrate(student, windows.split(4), 0.7, "decode")
    after = dict(student.model.named_parameters())
    assert all(torch.equal(after[name], parameter) for name, parameter in before.items())
    assert all(parameter.grad is None for parameter in after.values())
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in student.modules()]


def test_a_lower_price_closes_nothing_more(windows: torch.Tensor):
    prices, limits = [], []
    for target in (0.5, 0.7, 0.9):
        student = student_of(RouterSpec("channel"))
        prices.append(calibrate(student, windows.split(4), target, "decode").price)
        limits.append(torch.cat([p.detach() for p in student.added_parameters().values()]))
    assert prices == sorted(prices, reverse=True)
    assert (limits[0] >= limits[1]).all() and (limits[1] >= limits[2]).all()


def test_same_seed_same_start(windows: torch.Tensor):
    states = []
    for seed in (0, 0, 1):
        student = student_of(RouterSpec("channel"))
        calibrate(student, windows.split(4), 0.7, "decode", seed)
        states.append(torch.cat([p.detach() for p in student.added_parameters().values()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


@pytest.mark.parametrize(
    "router", [RouterSpec("head", network="static"), RouterSpec("expert", network="static")], ids=str
)
def test_estimated_cost_is_the_kl_of_closing_a_gate(router: RouterSpec, windows: torch.Tensor):
    """Static scores are log(cost / (price * saving)), so the estimated cost of each gate can be read off them."""
    model = make_tiny("llama")
    with torch.no_grad():
        for block in model.model.layers:  # small branches, so that a second-order estimate is exact enough
            block.self_attn.o_proj.weight.mul_(0.1)
            block.mlp.down_proj.weight.mul_(0.1)
    student = elasticize(model, StudentSpec((router,)))
    price = calibrate(student, windows.split(4), 0.85, "decode").price
    scores = list(student.added_parameters().values())
    open_all, close_all = (student.compute.uniform(share, windows.shape[1], "decode") for share in (1.0, 0.0))
    saving = (open_all - close_all) / sum(map(len, scores))
    estimated = torch.cat(scores).detach().exp() * price * saving
    measured = []
    with torch.no_grad():
        for score in scores:
            for gate in range(len(score)):
                for each in scores:
                    each.fill_(1)
                score[gate] = -1
                measured.append(kl(student, windows))
    ratios = estimated / torch.tensor(measured)
    assert ((ratios > 1 / 2) & (ratios < 2)).all(), ratios
    assert 0.8 < ratios.mean() < 1.25, ratios


def test_estimated_cost_of_an_image_model_s_heads_is_the_kl_of_closing_them():
    model, pixels = make_image("timm_fused"), draw(64, 3, 16, 16)
    with torch.no_grad():
        for block, scale in zip(model.blocks, (0.02, 0.5, 0.5), strict=True):  # all matter alike
            block.attn.proj.weight.mul_(scale)
    student = elasticize(model, StudentSpec((RouterSpec("head", network="static"),)))
    start = calibrate_images(student, observe_images(student, pixels.split(16), 0, DataShard()), (16, 16), [0.9])
    scores, measured = list(student.added_parameters().values()), []
    known = torch.cat(scores).detach()
    estimated = known.exp() * start.price * (1 - start.compute) / (known < 0).sum()
    with torch.no_grad(), student.teacher():
        exact = student(pixels)[0]
    for gate in range(12):
        with torch.no_grad():
            for number, score in enumerate(scores):
                score.copy_(torch.where(torch.arange(4) == gate - 4 * number, -1.0, 1.0))
            measured.append(float(forward_kl(student(pixels)[0], exact).mean()))
    ratios = estimated / torch.tensor(measured)
    assert ((ratios > 1 / 2) & (ratios < 2)).all() and 0.8 < ratios.mean() < 1.25, ratios


def test_tokens_that_never_close_are_not_observed():
    student = elasticize(make_image("timm_registers"), StudentSpec((RouterSpec("token", kv="drop"),)))
    seen = observe_images(student, draw(8, 3, 16, 16).split(4), 0, DataShard())
    assert [len(x) for part in seen.values() for x in part] == [8 * 16] * 12


def test_exempt_tokens_are_not_observed(windows: torch.Tensor):
    student = student_of(RouterSpec("token", substitute=4, prefix=3))
    seen = observe(student, windows.split(4))
    for place in (seen["0.attn"], seen["1.mlp"]):
        assert place.tokens == len(place.x) == len(place.y) == 16 * (16 - 3)
    assert not places(student_of(RouterSpec("token", substitute=4))) <= places(student)


@pytest.mark.parametrize("name", ["llama", "gemma2", "olmo2", "gpt2"])
@pytest.mark.parametrize("site", ["attn", "mlp"])
def test_substitutes_are_better_than_nothing(name: str, site: str, windows: torch.Tensor):
    student = student_of(RouterSpec("token", sites=(site,), substitute=32), name=name)
    calibrate(student, windows.split(4), 0.9, "decode")
    with torch.no_grad():
        for parameter_name, parameter in student.added_parameters().items():
            if "linear.bias" in parameter_name:
                parameter.fill_(-1e4)  # close every gate
    fitted = kl(student, windows)
    with torch.no_grad():
        for parameter_name, parameter in student.added_parameters().items():
            if "substitutes" in parameter_name:
                parameter.zero_()
    assert fitted < 0.8 * kl(student, windows)


def moments_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    one = torch.ones_like(x[:, :1])
    return torch.cat([x, one], 1).T @ torch.cat([x, one, y], 1)


def test_substitute_recovers_an_affine_map_of_its_rank():
    x = draw(2000, 16) @ draw(16, 16, seed=1) + 3
    y = x @ draw(16, 3, seed=2) @ draw(3, 16, seed=3) + draw(16, seed=4)
    for rank, error in ((3, 1e-2), (5, 1e-2)):
        substitute = Substitute(16, rank)
        fit_substitute(substitute, moments_of(x.double(), y.double()))
        assert (substitute(x) - y).norm() < error * (y - y.mean(0)).norm()


def test_substitute_of_lower_rank_is_the_best_there_is():
    """The fit has the smallest error of all maps of its rank, smaller than the truncated least-squares map's."""
    x = draw(2000, 8) * torch.logspace(0, 2, 8)
    y = x @ draw(8, 8, seed=1) + draw(2000, 8, seed=2)
    substitute = Substitute(8, 2)
    fit_substitute(substitute, moments_of(x.double(), y.double()))
    centred, target = x - x.mean(0), y - y.mean(0)
    full = torch.linalg.lstsq(centred, target).solution
    u, s, v = torch.linalg.svd(full)
    truncated = u[:, :2] * s[:2] @ v[:2]
    fitted = float((substitute(x) - y).norm().detach())
    assert fitted < (centred @ truncated - target).norm()
    outputs = torch.linalg.svd(centred @ full).Vh[:2]  # the optimum in closed form
    assert fitted == pytest.approx(float((centred @ full @ outputs.T @ outputs - target).norm()), rel=1e-3)


def test_a_substitute_fits_best_where_outputs_are_small():
    x = draw(2000, 8)
    y = torch.cat([x[:1600] @ draw(8, 8, seed=1), 10 * x[1600:] @ draw(8, 8, seed=2)])
    errors = []
    for seen in (moments_of(x, y), moments(x, y)):
        substitute = Substitute(8, 8)
        fit_substitute(substitute, seen)
        errors.append(float((substitute(x) - y)[:1600].norm().detach()))
    assert errors[1] < 0.5 * errors[0]


def test_a_wide_substitute_is_the_best_there_is():
    """The fit is optimal also where its few directions of many are found by iteration."""
    x = draw(600, 200) * torch.logspace(0, 2, 200)
    y = x @ draw(200, 200, seed=1) + 100 * draw(600, 200, seed=2)
    substitute = Substitute(200, 4)
    fit_substitute(substitute, moments_of(x.double(), y.double()))
    centred, target = (x - x.mean(0)).double(), (y - y.mean(0)).double()
    full = torch.linalg.lstsq(centred, target).solution
    outputs = torch.linalg.svd(centred @ full).Vh[:4]
    fitted = float((substitute(x) - y).norm().detach())
    assert fitted == pytest.approx(float((centred @ full @ outputs.T @ outputs - target).norm()), rel=1e-3)


def test_ridge_recovers_a_linear_map():
    x, weight = draw(500, 6) + 2, draw(6, 3, seed=1)
    fitted = ridge(x, x @ weight + 5, strength=1e-6)
    torch.testing.assert_close(fitted[:-1], weight, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(fitted[-1], torch.full((3,), 5.0), atol=1e-3, rtol=1e-3)


def test_ridge_penalises_the_weight_and_not_the_mean():
    x, y = draw(50, 6), draw(50, 2, seed=1) + 7
    loose, tight = ridge(x, y, 1e-3), ridge(x, y, 1e6)
    assert tight[:-1].norm() < 1e-3 * loose[:-1].norm()
    torch.testing.assert_close(tight[-1], y.mean(0), atol=1e-3, rtol=1e-3)


def test_predicted_costs_have_the_mean_of_the_costs_also_where_few_tokens_cost_the_most():
    x, cost = draw(400, 6), draw(400, 1, seed=1).exp()
    cost[::50] *= 1000
    router = Router(RouterSpec("token", sites=("mlp",)), 6, 1)
    choice = gated_choice(router, x, cost, saving=0.1, keeps_mean=True)
    assert float(choice.cost.mean()) == pytest.approx(float(cost.mean()), rel=1e-3)
    choice.apply(2.0)
    torch.testing.assert_close(router(x).detach() >= 0, choice.cost >= 2.0 * 0.1)


@pytest.mark.parametrize(("neurons", "groups"), [(48, 6), (48, 48), (50, 6), (10, 4), (7, 1)])
def test_clusters_are_balanced(neurons: int, groups: int):
    sizes = cluster_neurons(draw(64, neurons), groups).bincount(minlength=groups)
    assert sizes.sum() == neurons and sizes.max() - sizes.min() <= 1, sizes


def test_clusters_are_neurons_that_are_active_together():
    planted = torch.arange(5).repeat_interleave(8)[torch.randperm(40, generator=torch.Generator().manual_seed(2))]
    active = (draw(200, 5) > 1).float()
    found = cluster_neurons(active[:, planted] * draw(200, 40, seed=1) + 0.01 * draw(200, 40, seed=3), 5)
    together = planted[:, None] == planted[None]
    assert torch.equal(found[:, None] == found[None], together)


def test_full_rank_preview_is_exact_and_quality_grows_with_its_rows():
    student = student_of(RouterSpec("vocab", rank=32))
    head = student.model.get_output_embeddings()
    fit_vocab(head, draw(500, 32))
    router, hidden = head.routers["vocab"], draw(20, 32, seed=1)
    preview = hidden @ router.down.T @ router.preview_weight(head.base_layer.weight).T
    torch.testing.assert_close(preview, head.base_layer(hidden), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("rank", [4, 16])
def test_more_exact_rows_mean_less_kl(rank: int):
    student = student_of(RouterSpec("vocab", rank=rank))
    head = student.model.get_output_embeddings()
    hidden = draw(2000, 32)
    hidden[0] = 0  # of a padding token at the start of a text
    fits = fit_vocab(head, hidden)
    shares, divergences = [fit.share for fit in fits], [fit.kl for fit in fits]
    assert shares == sorted(shares) and divergences == sorted(divergences, reverse=True)
    assert [fit.spread for fit in fits] == sorted((fit.spread for fit in fits), reverse=True)
    for fit in fits:
        with torch.no_grad():
            head.routers["vocab"].spread.fill_(fit.spread)
            logits, share = head.routed_logits(hidden, *head.tensors())
        assert float(share.mean()) == pytest.approx(fit.share, abs=0.03)
        assert float(forward_kl(logits, head.base_layer(hidden)).mean()) == pytest.approx(fit.kl, rel=0.3)
    tail, lost = head.routers["vocab"].tail, []
    with torch.no_grad():
        for factor in (1, 2, 0):  # the fitted tail, the first, is the best
            logits, _ = head.routed_logits(hidden, torch.tensor(fits[1].spread), factor * tail, *head.tensors()[2:])
            lost.append(float(forward_kl(logits, head.base_layer(hidden)).mean()))
    assert lost[0] < min(lost[1:])
