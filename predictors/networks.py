"""What gives every neuron or head of a layer a score; the higher, the more it is believed to matter.

Scorers of a tap read ``z [B, S, D]``, the residual stream standardised without gain or bias, and give
``[B, S, n]`` for this rank's n neurons or heads. Those made from fc1 hold it with the norm's gain and bias
folded in, so that they too read ``z``.

Shape legend: B batch, S query length, D hidden, N local heads, H head dim, n local neurons or heads, r rank.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dejavu.kernels.predict import predict

# A matrix of few bits has one 16-bit scale for so many weights of a row; one of 8 bits has one of 32 for the
# row, which is how the kernels read it: they choose what the stored weights choose.
GROUP = 64


class LowRank(nn.Module):
    """``Linear(D, r) -> Linear(r, n)`` of the paper (section 4.1), with an output bias.

    ``relu`` in between is an option for heads: without it the rank is bounded by their number.
    """

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor, *, relu: bool = False) -> None:
        super().__init__()
        self.down, self.up, self.bias = (nn.Parameter(t, requires_grad=False) for t in (down, up, bias))
        self.relu = relu

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, S, D]`` to scores ``[B, S, n]``: a trained one's are log odds."""
        hidden = F.linear(z, self.down)
        return F.linear(F.relu(hidden) if self.relu else hidden, self.up, self.bias)


class PackedLowRank(nn.Module):
    """A `LowRank` as decoding on a GPU reads it: fp16 weights, or int8 with a scale a row. Where the product
    of its layers is less to read, in fp32, it is the first layer, and the second does nothing (few heads).

    What scores above ``threshold`` is chosen. It lies on the device, so that it can move under a graph.

    Args:
        network: in fp32.
        bits: 16, or 8: exact for weights that were stored in 8.
    """

    down: Tensor
    down_scale: Tensor | None
    down_sums: Tensor
    up: Tensor
    up_scale: Tensor | None
    threshold: Tensor
    tally: Tensor

    def __init__(self, network: LowRank, bits: int) -> None:
        super().__init__()
        down, up = network.down.data, network.up.data
        if not network.relu and len(up) * 32 < len(down) * bits:
            bits, down, up = 32, up.float() @ down.float(), torch.eye(len(up), device=up.device)
        for name, weight in (("down", down), ("up", up)):
            data, scale = _stored(weight, bits)
            self.register_parameter(name, nn.Parameter(data, requires_grad=False))
            self.register_buffer(f"{name}_scale", scale)
        self.bias = nn.Parameter(network.bias.float(), requires_grad=False)
        self.relu = network.relu
        self.register_buffer("down_sums", self._wide("down").sum(-1))
        self.register_buffer("threshold", torch.zeros(1))
        self.register_buffer("tally", torch.zeros(2, dtype=torch.int64))

    def at(self, threshold: float) -> "PackedLowRank":
        """The same weights with a threshold and a tally of their own."""
        twin = copy.copy(self)
        own = {"threshold": torch.full_like(self.threshold, threshold), "tally": torch.zeros_like(self.tally)}
        twin._buffers = {**self._buffers, **own}
        return twin

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, S, D]`` to scores ``[B, S, n]``, for whole texts; decoding calls `active_set`."""
        hidden = F.linear(z, self._wide("down").to(z.dtype))
        scores = F.linear(F.relu(hidden) if self.relu else hidden, self._wide("up").to(z.dtype))
        return scores + self.bias

    def active_set(
        self,
        residual: Tensor,
        alive: Tensor | None,
        *,
        union: bool,
        beside: bool = False,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The ids and the count of what is chosen at ``residual [B, D]``: of the whole batch or, without
        ``union``, of each sequence. See `dejavu.kernels.predict.predict`."""
        return predict(
            residual,
            self.down,
            self.down_scale,
            self.down_sums,
            self.up,
            self.up_scale,
            self.bias,
            self.threshold,
            alive,
            self.tally,
            union=union,
            relu=self.relu,
            beside=beside,
            out=out,
        )

    def _wide(self, name: str) -> Tensor:
        weight: Tensor = getattr(self, name).float()
        scale: Tensor | None = getattr(self, f"{name}_scale")
        return weight if scale is None else weight * scale


def _stored(weight: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """A matrix in 8 bits, with the scale of each row in fp32 ``[n, 1]``, in 16, or as it is."""
    if bits == 8:
        scale = weight.float().abs().amax(-1, keepdim=True).clamp(min=1e-12) / 127
        return (weight / scale).round().to(torch.int8), scale
    return (weight.half() if bits == 16 else weight), None


class Rows(nn.Module):
    """A cheaper copy of fc1: its scores are estimates of the pre-activations.

    With ``signs`` the rows are signs times a scale, and of ``z`` too only the signs are used.
    """

    def __init__(self, weight: Tensor, bias: Tensor, *, signs: bool = False) -> None:
        super().__init__()
        self.weight, self.bias = (nn.Parameter(t, requires_grad=False) for t in (weight, bias))
        self.signs = signs

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, S, D]`` to scores ``[B, S, n]``."""
        if self.signs:
            z = z.sign() * z.abs().mean(-1, keepdim=True)
        return F.linear(z, self.weight, self.bias)


class SimHash(nn.Module):
    """The paper's nearest-neighbour view (section 3.2) by random hyperplanes (Charikar 2002): the share of
    planes that separate ``z`` from a row estimates their angle, and so the pre-activation.

    Args:
        planes: ``[M, D]``, random normals.
        codes: ``[n, M]``, +1 or -1, on which side of each plane a row lies.
        norms: ``[n]``, the rows' lengths.
        bias: ``[n]``.
    """

    def __init__(self, planes: Tensor, codes: Tensor, norms: Tensor, bias: Tensor) -> None:
        super().__init__()
        tensors = (planes, codes, norms, bias)
        self.planes, self.codes, self.norms, self.bias = (
            nn.Parameter(t, requires_grad=False) for t in tensors
        )

    def forward(self, z: Tensor) -> Tensor:
        """``z [B, S, D]`` to scores ``[B, S, n]``."""
        agreement = F.linear(F.linear(z, self.planes).sign(), self.codes) / len(self.planes)
        cosine = torch.sin(agreement * (math.pi / 2))  # cos(pi * separating share)
        scores: Tensor = cosine * self.norms * z.norm(dim=-1, keepdim=True) + self.bias
        return scores


class Static(nn.Module):
    """The same scores ``[n]`` for every token: how much each neuron or head matters on average."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores, requires_grad=False)

    def forward(self, positions: Tensor) -> Tensor:
        """``positions [B, S]`` to scores ``[B, S, n]``."""
        return self.scores.expand(*positions.shape, -1)


class Random(nn.Module):
    """A hash of seed, layer, position and neuron, uniform in [0, 1): the lower bound.

    Args:
        ids: ``int64[n]``, this rank's neurons or heads in the model's numbering.
    """

    ids: Tensor

    def __init__(self, ids: Tensor, *, layer: int, seed: int) -> None:
        super().__init__()
        self.register_buffer("ids", ids)
        self.salt = (seed * 1_000_003 + layer) % 2**31

    def forward(self, positions: Tensor) -> Tensor:
        """``positions [B, S]`` to scores ``[B, S, n]``."""
        x = _mix(_mix(positions[..., None] + (self.salt << 32)) + self.ids)
        return (x & 0xFFFFFF).float() / 2**24


def _mix(x: Tensor) -> Tensor:
    """A bijection of 64-bit integers under which neighbours become unrelated (multiply and xor-shift)."""
    for factor, shift in ((-0x61C8864680B583EB, 29), (-0x4B47D0C5A1B9D4F3, 32), (0x2545F4914F6CDD1D, 31)):
        x = x * factor
        x = x ^ ((x >> shift) & (2 ** (64 - shift) - 1))
    return x


class NeuronContribution(nn.Module):
    """The truth about neurons: ``|activation| * ||fc2 column||``, what each adds to the residual stream.

    Args:
        norms: ``[F]``, of the neurons' output weights.
    """

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.norms = nn.Parameter(norms, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Activations ``[B, S, F]`` to contributions ``[B, S, F]``."""
        return hidden.to(self.norms.dtype) * self.norms


class HeadContribution(nn.Module):
    """The truth about heads: ``||(head_out - mean) @ W_o||``, by how much leaving each to its mean is wrong.

    Args:
        out_proj: ``[N, H, D]``.
        mean: ``[N, H]``, what stands in for a head that is left out; None: nothing does.
    """

    def __init__(self, out_proj: Tensor, mean: Tensor | None = None) -> None:
        super().__init__()
        self.gram = nn.Parameter(out_proj @ out_proj.transpose(1, 2), requires_grad=False)
        self.mean = None if mean is None else nn.Parameter(mean, requires_grad=False)

    def forward(self, outputs: Tensor) -> Tensor:
        """Outputs ``[B, S, N, H]`` to contributions ``[B, S, N]``."""
        x = outputs.to(self.gram.dtype)
        if self.mean is not None:
            x = x - self.mean
        squares = torch.einsum("bsnh,nhk,bsnk->bsn", x, self.gram, x)
        return squares.clamp(min=0).sqrt()


def fold_norm(
    fc1: Tensor, bias: Tensor | None, gain: Tensor | None, shift: Tensor | None, *, pre_norm: bool
) -> tuple[Tensor, Tensor]:
    """fc1 as a function of the standardised stream: weight ``[F, D]`` and bias ``[F]``.

    Pre-norm: fc1 reads ``gain * z + shift``, so the two fold in exactly. Post-norm: it reads the stream
    itself, which is some ``m + s z`` with a mean and a deviation of each token; they are replaced by those
    that the norm's gain and bias give a typical token.
    """
    D = fc1.shape[1]
    bias = fc1.new_zeros(len(fc1)) if bias is None else bias
    gain = fc1.new_ones(D) if gain is None else gain
    shift = fc1.new_zeros(D) if shift is None else shift
    if pre_norm:
        return fc1 * gain, bias + fc1 @ shift
    deviation = (gain.square().mean() + shift.var(correction=0)).sqrt()
    return fc1 * deviation, bias + shift.mean() * fc1.sum(-1)


def low_rank_of(weight: Tensor, rank: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-r ``(down [r, D], up [n, r])`` of ``weight [n, D]`` (SVD); zeros beyond its own rank.

    With ``scale [D, D]``, the root of the inputs' covariance, it is the best for those inputs.
    """
    u, s, v = torch.linalg.svd(weight if scale is None else weight @ scale, full_matrices=False)
    root = s[:rank].sqrt()
    down = root[:, None] * v[:rank]
    if scale is not None:
        down = torch.linalg.solve(scale, down, left=False)
    missing = rank - len(root)
    return F.pad(down, (0, 0, 0, max(missing, 0))), F.pad(u[:, :rank] * root, (0, max(missing, 0)))


def scales_a_row(columns: int, bits: int) -> int:
    """How many scales each row of a quantised matrix has."""
    return columns // GROUP if bits < 8 and columns % GROUP == 0 else 1


def quantise(weight: Tensor, bits: int, tries: int = 15) -> tuple[Tensor, Tensor]:
    """``weight [n, D]`` as codes ``int8[n, D]`` of ``bits`` bits and scales ``[n, groups]``, fp16 (of 8 bits
    fp32, as the kernels read them).

    Codes are symmetric, ``-(2**(bits-1) - 1)`` to its opposite (2 bits: three values). Each group's scale is
    the one of ``tries`` that leaves the smallest square error.
    """
    n, D = weight.shape
    top = 2 ** (bits - 1) - 1
    w = weight.float().view(n, scales_a_row(D, bits), -1)
    peak = w.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top
    best_error = torch.full_like(peak, torch.inf)
    best_scale = peak
    for share in torch.linspace(1.0, 0.3, tries).tolist():
        scale = peak * share
        if bits < 8:
            scale = scale.half().float().clamp(min=2**-24)
        error = ((w / scale).round().clamp(-top, top) * scale - w).square().sum(-1, keepdim=True)
        better = error < best_error
        best_error, best_scale = error.where(better, best_error), scale.where(better, best_scale)
    codes = (w / best_scale).round().clamp(-top, top).to(torch.int8)
    scales = best_scale.squeeze(-1)
    return codes.view(n, D), scales.half() if bits < 8 else scales


def dequantise(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix fp32 ``[n, D]`` that `quantise` stands for."""
    n, D = codes.shape
    return (codes.view(n, scales.shape[1], -1).float() * scales[..., None].float()).view(n, D)
