"""How a predictor is fitted to the traces of its layer: a regression in closed form, then gradient descent.

Shape legend: T tokens, b tokens of a batch, D hidden, F ffn, N heads, H head dim, n neurons or heads, r rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dejavu.predictors.collect import decode_table
from dejavu.predictors.networks import HeadContribution, LowRank, dequantise, low_rank_of, quantise

Loss = Callable[[Tensor, Tensor], Tensor]  # of scores [b, n] and the numbers of their tokens [b]
# Tokens that are worked on at once where all are needed.
_CHUNK = 32768
# Weights of few bits are rounded in the forward pass for the last part of the training.
_ROUNDED_PART = 0.4


def regress(tap: Tensor, own: Tensor, fc1: Tensor, bias: Tensor, rank: int) -> LowRank:
    """The best rank-r map from a tap to the pre-activations (reduced-rank regression, in closed form).

    A neuron's score is the estimate in units of its own error, so that one threshold is as sure of every
    neuron: with normal errors the score is the probit of its being live.

    Args:
        tap: ``[T, D]``, what the predictor reads.
        own: ``[T, D]``, the tap at the MLP itself, of which the pre-activations are ``own @ fc1.T + bias``.
        fc1, bias: ``[F, D]`` and ``[F]``, with the norm folded in.

    Raises:
        ValueError: no more tokens than ranks.
    """
    (T, D), device = tap.shape, fc1.device
    if rank >= T:
        raise ValueError(f"{T} tokens of traces are too few for rank {rank}")
    sums = torch.zeros(2 * D, dtype=torch.float64, device=device)
    products = torch.zeros(2 * D, 2 * D, dtype=torch.float64, device=device)
    for x, y in zip(tap.split(_CHUNK), own.split(_CHUNK), strict=True):
        both = torch.cat([x.to(device), y.to(device)], dim=1).double()
        sums += both.sum(0)
        products += both.T @ both
    mean_x, mean_y = (sums / T).chunk(2)
    covariance = products / T - (sums / T).outer(sums / T)
    cov_xx, cov_yx, cov_yy = covariance[:D, :D], covariance[D:, :D], covariance[D:, D:]
    values, vectors = torch.linalg.eigh(cov_xx)
    values = values.clamp(min=float(values.max()) * 1e-6)
    wide = fc1.double()
    best = wide @ cov_yx @ (vectors / values) @ vectors.T
    down, up = low_rank_of(best, rank, vectors * values.sqrt() @ vectors.T)
    shift = bias + wide @ mean_y - up @ (down @ mean_x)
    found = up @ down
    error = ((wide @ cov_yy) * wide - 2 * (wide @ cov_yx) * found + (found @ cov_xx) * found).sum(-1)
    deviation = error.clamp(min=1e-3 * float(error.mean())).sqrt()
    return LowRank(down.float(), (up / deviation[:, None]).float(), (shift / deviation).float())


def random_network(D: int, rank: int, n: int, *, relu: bool, seed: int) -> LowRank:
    """Where training begins that has no regression to begin from."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, D, generator=generator) / D**0.5
    up = torch.randn(n, rank, generator=generator) / rank**0.5
    return LowRank(down, up, torch.zeros(n), relu=relu)


@dataclass(frozen=True, kw_only=True, slots=True)
class Descent:
    """AdamW over shuffled batches; the learning rate rises for a twentieth of the steps, then falls (cosine).

    With ``bits`` below 16 the matrices are rounded as they will be stored in the last part of the steps.
    """

    epochs: float
    batch: int
    lr: float
    bits: int
    seed: int

    def run(self, network: LowRank, z: Tensor, loss: Loss) -> None:
        """Trains ``network`` in place on ``z [T, D]``.

        Raises:
            ValueError: its weights are no finite numbers any more.
        """
        T, device = len(z), network.down.device
        batch = min(self.batch, T)
        steps = max(2, round(self.epochs * T / batch))
        shuffle = torch.Generator().manual_seed(self.seed)
        parameters = [p.requires_grad_() for p in network.parameters()]
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.01, betas=(0.9, 0.99))
        rise = max(1, steps // 20)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1, (s + 1) / rise) * (1 + math.cos(math.pi * s / steps)) / 2
        )
        order = torch.empty(0, dtype=torch.int64)
        for step in range(steps):
            if len(order) < batch:
                order = torch.cat([order, torch.randperm(T, generator=shuffle)])
            rows, order = order[:batch].to(device), order[batch:]
            x = z[rows.to(z.device)].to(device).float()
            rounded = self.bits < 16 and step >= steps * (1 - _ROUNDED_PART)
            scores = _rounded(network, x, self.bits) if rounded else network(x)
            optimizer.zero_grad()
            torch.autograd.backward(loss(scores, rows))
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
        for p in parameters:
            p.requires_grad_(False)
        if not all(p.isfinite().all() for p in parameters):
            raise ValueError(f"training diverged: lr={self.lr} is too large")


def _rounded(network: LowRank, x: Tensor, bits: int) -> Tensor:
    """The network with its matrices as they will be stored; gradients pass as if they were not rounded."""

    def rounded(w: Tensor) -> Tensor:
        return w + (dequantise(*quantise(w.detach(), bits, tries=4)) - w).detach()

    hidden = F.linear(x, rounded(network.down))
    return F.linear(F.relu(hidden) if network.relu else hidden, rounded(network.up), network.bias)


def neuron_loss(codes: Sequence[Tensor], fc2_norms: Tensor, *, skip: float, weighting: float) -> Loss:
    """Weighted binary cross-entropy (paper, section 4.1): live neurons count by what they contribute.

    Args:
        codes: the activations as bytes, ``[T, n]`` in slices of columns.
        fc2_norms: ``[F]``; a neuron contributes its activation times this.
        skip: the share of the contribution whose smallest parts are not called live; 0: all are.
        weighting: the power of the contribution (in units of the mean) that weighs a live neuron.
    """
    device = fc2_norms.device
    table = decode_table(device)
    sample = table[_rows(codes, torch.arange(min(4096, len(codes[0])), device=device)).long()] * fc2_norms
    cut = _smallest_carrying(sample, 1 - skip) if skip else 0.0
    typical = sample[sample > cut].mean() if bool((sample > cut).any()) else torch.ones((), device=device)
    # the largest code of each neuron that does not count: comparing bytes is much less work than weighing
    dead = (table[:, None] * fc2_norms <= cut).sum(0).sub(1).clamp(min=0).to(torch.uint8)

    def loss(scores: Tensor, rows: Tensor) -> Tensor:
        bytes_ = _rows(codes, rows)
        token, neuron = (bytes_ > dead).nonzero(as_tuple=True)
        contribution = table[bytes_[token, neuron].long()] * fc2_norms[neuron]
        weight = (contribution / typical).pow(weighting).clamp(0.05, 20.0)
        live = scores[token, neuron]
        total = F.softplus(scores).sum() + (weight * F.softplus(-live) - F.softplus(live)).sum()
        return total / scores.numel()

    return loss


def head_loss(target: Tensor) -> Loss:
    """The square error of ``target [T, N]``, the standardised logarithms of what the heads contribute."""

    def loss(scores: Tensor, rows: Tensor) -> Tensor:
        return F.mse_loss(scores, target[rows])

    return loss


def neuron_contributions(codes: Sequence[Tensor], fc2_norms: Tensor) -> Tensor:
    """What each neuron contributes, the mean over tokens: ``fp32[F]``."""
    table, T = decode_table(fc2_norms.device), len(codes[0])
    total = torch.zeros_like(fc2_norms)
    for rows in torch.arange(T, device=fc2_norms.device).split(_CHUNK // 4):
        total += table[_rows(codes, rows).long()].sum(0)
    return total / T * fc2_norms


def head_contributions(outputs: Tensor, out_proj: Tensor, mean: Tensor | None) -> Tensor:
    """What each head contributes: ``outputs [T, N, H]`` to ``fp32[T, N]``, more than 0."""
    contribution = HeadContribution(out_proj, mean)
    parts = [contribution(part.float()[None])[0] for part in outputs.split(_CHUNK)]
    return torch.cat(parts).clamp(min=1e-6)


def as_log_odds(network: LowRank) -> LowRank:
    """Probits as log odds, to go on from: a logistic curve is close to a normal one 1.7 times as wide."""
    rescale(network, torch.tensor(1.7), torch.tensor(0.0))
    return network


def rescale(network: LowRank, factor: Tensor, shift: Tensor) -> None:
    """Scores ``s`` become ``factor * s + shift``."""
    factor, shift = factor.to(network.up.device), shift.to(network.up.device)
    network.up.mul_(factor)
    network.bias.mul_(factor).add_(shift)


def _smallest_carrying(contribution: Tensor, share: float) -> float:
    """Just below the smallest of the largest contributions that make up ``share`` of the sum."""
    falling = contribution.flatten().sort(descending=True).values
    carried = falling.double().cumsum(0)
    last = int((carried < carried[-1] * share).sum())
    return float(falling[min(last, len(falling) - 1)]) * 0.999


def _rows(slices: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The given rows of a matrix that lies in slices of columns, where ``rows`` are."""
    return torch.cat([s[rows.to(s.device)].to(rows.device) for s in slices], dim=1)
