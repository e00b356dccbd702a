"""Least-squares fits that initialise routers, substitutes and the preview of the LM head."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from students.execution.head import RoutedHead
from students.routers import Substitute, VocabRouter
from students.shards import open_unit

EXTRA = 16
"""Vectors that the block Krylov iteration in `_leading` carries in addition to those asked for."""
ROUNDS = 5
"""Rounds of this iteration."""
FEW = 8
"""The iteration is used for matrices with more than this many times as many columns as vectors that it carries."""
JUDGED = 512
"""Number of hidden states on which a preview's quality is measured."""
CLUSTERINGS = 8
"""Rounds of k-means in `cluster_neurons`."""


def ridge(x: Tensor, y: Tensor, strength: float = 0.03) -> Tensor:
    """Return the ridge regression of y [rows, k] on x [rows, D]: weights [D + 1, k], the last row an unpenalised bias.

    strength: the penalty, as a share of the inputs' mean variance times the number of rows.
    """
    centre, target = x.mean(0), y.mean(0)
    moved = x - centre
    gram = moved.T @ moved
    gram.diagonal().add_(strength * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, moved.T @ (y - target))
    return torch.cat([weight, (target - centre @ weight).unsqueeze(0)])


@torch.no_grad()
def fit_substitute(substitute: Substitute, moments: Tensor) -> None:
    """Set a substitute to the rank-r affine map with the least squared error on the calibration tokens.

    moments: weighted sum over tokens of (x, 1)^T (x, 1, y), [D + 1, D + 1 + D_out]. This is reduced-rank regression:
    the least-squares map is truncated in the metric of the inputs' covariance (not of the weights), which is optimal
    under a rank constraint.
    """
    rank, width = substitute.down.shape
    moments = moments.double()
    count = moments[width, width]
    mean_x, mean_y = moments[width, :width] / count, moments[width, width + 1 :] / count
    cov = moments[:width, :width] / count - mean_x.outer(mean_x)
    cross = moments[:width, width + 1 :] / count - mean_x.outer(mean_y)
    cov.diagonal().add_(1e-4 * cov.diagonal().mean())
    root = _root(cov)

    def times(v: Tensor) -> Tensor:
        """Return M v for the least-squares map M [D, D_out] from whitened inputs to outputs."""
        out: Tensor = torch.linalg.solve_triangular(root, cross @ v, upper=False)
        return out

    def back(u: Tensor) -> Tensor:
        return cross.T @ _unwhitened(root, u)

    v = _leading(times, back, cross.shape[1], rank, cross.device)
    u, r = torch.linalg.qr(times(v))
    down, up = _unwhitened(root, u), r @ v.T
    substitute.down.copy_(down.T)
    substitute.up.copy_(up.T)
    substitute.bias.copy_(mean_y - mean_x @ down @ up)


def _root(matrix: Tensor) -> Tensor:
    """Return the Cholesky factor of a positive matrix, after adding as little to its diagonal as rounding requires."""
    more = 1e-12 * matrix.diagonal().mean()
    root: Tensor
    for _ in range(12):
        root, failed = torch.linalg.cholesky_ex(matrix + more * torch.eye(len(matrix), device=matrix.device))
        if not failed:
            return root
        more = 10 * more
    raise ValueError("nothing can be fitted to weights or activations that are all zero, or not finite")


def _unwhitened(root: Tensor, u: Tensor) -> Tensor:
    """Return the inverse of the root's transpose times u."""
    out: Tensor = torch.linalg.solve_triangular(root.T, u, upper=True)
    return out


def _leading(
    times: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor], columns: int, rank: int, device: torch.device
) -> Tensor:
    """Return the first `rank` right singular vectors [columns, rank] of a float64 matrix A, the largest first.

    times and back: multiply A and its transpose, respectively, by some columns. Few vectors are found by block Krylov
    iteration (arXiv 1504.05477), many as eigenvectors of A^T A.
    """
    size = rank + EXTRA
    if FEW * size >= columns:
        whole = torch.eye(columns, dtype=torch.double, device=device)
        vectors: Tensor = torch.linalg.eigh(back(times(whole))).eigenvectors
        return vectors.flip(1)[:, :rank]
    basis = torch.randn(columns, size, dtype=torch.double, generator=torch.Generator().manual_seed(0)).to(device)
    blocks = []
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(back(times(basis))).Q
        blocks.append(basis)
    basis = torch.linalg.qr(torch.cat(blocks, 1)).Q
    turned: Tensor = torch.linalg.eigh(basis.T @ back(times(basis))).eigenvectors
    leading: Tensor = basis @ turned.flip(1)[:, :rank]
    return leading


@dataclass(frozen=True)
class VocabFit:
    """A preview's quality at one setting: share of exact rows, KL to the exact head in nats, the limit's spread."""

    share: float
    kl: float
    spread: float


@torch.no_grad()
def fit_vocab(head: RoutedHead, hidden: Tensor, scale: float = 1.0) -> list[VocabFit]:
    """Fit the preview of the LM head to final hidden states [n, D]; return its quality at several shares of exact rows.

    scale: factor from the head's outputs to logits.

    The preview is the rank-r map of h with the least squared error of all logits: a truncation in the metric of the
    head's weight on one side and of the hidden states' second moments on the other. Its basis is orthonormal in the
    first metric, so that |f| measures how far a token's previewed logits spread.
    """
    open_unit(head)
    router, weight = head.routers["vocab"], head.base_layer.get_parameter("weight")
    assert isinstance(router, VocabRouter)
    hidden = hidden.float()
    gram = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
    for part in weight.split(8192):
        gram += part.float().T @ part.float()
    root, rows_of = _root(gram.double()), hidden.double()

    def times(v: Tensor) -> Tensor:
        return rows_of @ (root @ v)

    def back(u: Tensor) -> Tensor:
        return root.T @ (rows_of.T @ u)

    rank = router.down.shape[0]
    v = _leading(times, back, len(gram), rank, gram.device)
    size = len(weight) ** 0.5  # scales f such that the mean square of a token's previewed logits is |f|^2
    router.up.copy_(_unwhitened(root, v) * size)
    router.down.copy_((root @ v).T / size)
    preview_weight = router.preview_weight(weight).float()
    router.slope.copy_(preview_weight.mean(0))
    fits = []
    picked = hidden[torch.linspace(0, len(hidden) - 1, min(JUDGED, len(hidden)), device=hidden.device).long()]
    shares = (0.03, 0.06, 0.09, 0.12, 0.18, 0.25)
    sums = torch.zeros(len(shares), 3)  # KL, spread, tail
    for part in picked.split(64):
        features = part @ router.down.T
        preview = features @ preview_weight.T
        exact = torch.cat([part @ some.float().T for some in weight.split(8192)], 1)
        log_p = (scale * exact).log_softmax(-1)
        norm = features.norm(dim=-1, keepdim=True).clamp(min=1e-20)  # a zero embedding, alone, has a state of zeros
        above = (preview - features @ router.slope.unsqueeze(-1)) / norm
        ranked = above.topk(round(max(shares) * len(weight)), dim=-1).values
        for place, share in enumerate(shares):
            spread = ranked[:, round(share * len(weight)) - 1]
            closed = above < spread.unsqueeze(-1)
            tail = scale * (exact - preview)[closed].float().var() / 2  # E[exp(scale * (preview + normal error))]
            log_q = (scale * torch.where(closed, preview + tail, exact)).log_softmax(-1)
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            sums[place] += torch.stack([kl.sum(), spread.sum(), tail * len(part)]).cpu()
    for share, (kl, spread, _) in zip(shares, (sums / len(picked)).tolist(), strict=True):
        fits.append(VocabFit(share, kl, spread))
    router.tail.copy_(sums[1, 2] / len(picked))
    return fits


def cluster_neurons(activations: Tensor, groups: int) -> Tensor:
    """Return the group [F] of each neuron: neurons that are active together in activations [rows, F] share a group.

    Groups are of equal size (within one). Balanced k-means on the direction of each neuron's |activation| over the
    rows; in every round neurons choose in the order of their margin between the best and the second-best group.
    """
    profiles = F.normalize(activations.abs().T, dim=1)
    neurons = len(profiles)
    centres = profiles[torch.linspace(0, neurons - 1, groups).long()]
    member = torch.zeros(neurons, dtype=torch.long)
    for _ in range(CLUSTERINGS):
        likeness = profiles @ F.normalize(centres, dim=1).T
        best = likeness.topk(min(2, groups), dim=1).values
        order = (best[:, 0] - best[:, -1]).argsort(descending=True).tolist()
        ranked = likeness.argsort(dim=1, descending=True).tolist()
        room = [neurons // groups + (group < neurons % groups) for group in range(groups)]
        for neuron in order:
            group = next(g for g in ranked[neuron] if room[g])
            room[group] -= 1
            member[neuron] = group
        centres = torch.zeros_like(centres).index_add_(0, member.to(centres.device), profiles)
    return member.to(activations.device)
