"""How the next token is drawn from the logits.

Shape legend: B batch, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dejavu.kernels.tokens import NO_TOKEN, likeliest


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """What a request may set.

    ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 leave all tokens in. The same ``seed`` draws the
    same random stream on every rank and device, whatever else is in the batch. The text ends before the first
    of ``stop``, at the model's end of text (unless ``ignore_eos``), or after ``max_new_tokens``.

    Raises:
        ValueError: a value out of its range.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "top_k", "seed"):
            if type(getattr(self, name)) is not int:
                raise ValueError(f"{name}={getattr(self, name)!r} is not an integer")
        for name in ("temperature", "top_p"):
            if type(getattr(self, name)) not in (int, float):
                raise ValueError(f"{name}={getattr(self, name)!r} is not a number")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} is less than 1")
        if not 0 <= self.temperature <= 1e6:
            raise ValueError(f"temperature={self.temperature} is not in [0, 1e6]")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k={self.top_k} is not in [0, 2**31); 0 leaves all tokens in")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} is not in (0, 1]")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} is not in [0, 2**63)")
        if not isinstance(self.stop, tuple) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError(f"stop={self.stop!r} is not a tuple of non-empty strings")


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sampling parameters of a batch as device tensors, so that a step needs nothing from the host.

    ``temperature, top_k, top_p: [B]``; ``uniforms [steps, B]``, every random number the requests will use;
    ``step [1]`` counts the draws; ``greedy`` when no sequence needs a draw.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    uniforms: Tensor
    step: Tensor
    greedy: bool

    @classmethod
    def empty(cls, batch: int, steps: int, device: torch.device, *, greedy: bool) -> "Sampler":
        """A sampler for ``batch`` requests of at most ``steps`` tokens, all greedy."""
        return cls(
            temperature=torch.zeros(batch, dtype=torch.float32, device=device),
            top_k=torch.zeros(batch, dtype=torch.int64, device=device),
            top_p=torch.ones(batch, dtype=torch.float32, device=device),
            uniforms=torch.zeros(0 if greedy else steps, batch, dtype=torch.float64, device=device),
            step=torch.zeros(1, dtype=torch.int64, device=device),
            greedy=greedy,
        )

    def begin(self, params: Sequence[SamplingParams]) -> None:
        """Takes new requests, as many as there are places or fewer."""
        n = len(params)
        self.step.zero_()
        if self.greedy:
            return
        self.temperature[:n] = torch.tensor([p.temperature for p in params])
        self.top_k[:n] = torch.tensor([p.top_k for p in params])
        self.top_p[:n] = torch.tensor([p.top_p for p in params])
        for i, p in enumerate(params):
            generator = torch.Generator().manual_seed(p.seed)
            self.uniforms[: p.max_new_tokens, i] = torch.rand(
                p.max_new_tokens, generator=generator, dtype=torch.float64
            ).to(self.uniforms.device)

    def __call__(self, logits: Tensor) -> Tensor:
        """``logits [B, V]`` (fp32) to token ids ``[B]``; uses up one draw of every sequence's stream.

        A row that has no finite maximum becomes `NO_TOKEN`: the host will see it, and need not be asked here.
        """
        tokens = likeliest(logits)
        if not self.greedy:
            uniform = self.uniforms.index_select(0, self.step)[0]
            drawn = sample(logits, self.temperature, self.top_k, self.top_p, uniform)
            tokens = torch.where((self.temperature == 0) | (tokens == NO_TOKEN), tokens, drawn)
        self.step.add_(1)
        return tokens


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token a row by inverting the distribution function at ``uniform``.

    Temperature, then the ``top_k`` largest, then the smallest set of at least ``top_p`` of what is left.

    Args:
        logits: ``[B, V]``.
        temperature, top_k, top_p: ``[B]``; a temperature under 1e-6 is read as that.
        uniform: ``[B]`` in [0, 1).

    Returns:
        ``[B]`` token ids.
    """
    # from the maximum down, so that no temperature can make an infinity of the likeliest token
    scaled = (logits - logits.amax(-1, keepdim=True)) / temperature.clamp(min=1e-6)[:, None]
    scaled, tokens = torch.sort(scaled, dim=-1, descending=True, stable=True)
    rank = torch.arange(logits.shape[-1], device=logits.device)
    in_top_k = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    probs = scaled.masked_fill(~in_top_k, -torch.inf).softmax(-1)
    # Whole numbers from here on: their running sums have the same bits in any order of addition, so every
    # rank draws the same token (a GPU's floating-point cumsum promises no order).
    weights = (probs * 2**40).long()
    mass_before = weights.cumsum(-1) - weights
    limit = torch.where(top_p < 1, (top_p.double() * 2**40).clamp(min=1), torch.inf)
    cumulative = (weights * (mass_before < limit[:, None])).cumsum(-1)
    target = (uniform[:, None] * cumulative[:, -1:]).long()
    chosen = (cumulative <= target).sum(-1, keepdim=True).clamp(max=logits.shape[-1] - 1)
    return tokens.gather(-1, chosen)[:, 0]
