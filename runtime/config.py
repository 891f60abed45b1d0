"""The architecture of an OPT model, as its ``config.json`` states it."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

# The sizes without which there is no model; Hugging Face's name -> ours where they differ.
_REQUIRED = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_dim": "ffn_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "max_position_embeddings": "max_position_embeddings",
}
# A config may be silent on these, as the hub's are on most; Hugging Face then assumes `OPTConfig`'s defaults.
_OPTIONAL = (
    "do_layer_norm_before",
    "enable_bias",
    "layer_norm_elementwise_affine",
    "tie_word_embeddings",
    "eos_token_id",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class OPTConfig:
    """Sizes and kinds, in Hugging Face's terms (``num_layers`` and ``num_heads`` for short).

    Raises:
        ValueError: the sizes contradict each other.
    """

    vocab_size: int
    hidden_size: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    word_embed_proj_dim: int
    do_layer_norm_before: bool = True  # False for opt-350m alone
    has_final_layer_norm: bool = True
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    eos_token_id: int = 2
    dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        for name in (*_REQUIRED.values(), "word_embed_proj_dim"):
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name}={size!r} is not a positive integer")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size={self.hidden_size} is not divisible by num_heads={self.num_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def check_tp(self, size: int) -> None:
        """Whether ``size`` ranks can share this model.

        Raises:
            ValueError: they can't; the message says which sizes can.
        """
        fits = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == self.ffn_dim % n == 0]
        if size not in fits:
            raise ValueError(
                f"num_heads={self.num_heads} and ffn_dim={self.ffn_dim} cannot be split over {size} ranks; "
                f"{', '.join(map(str, fits))} would work"
            )

    @classmethod
    def from_json(cls, path: Path) -> "OPTConfig":
        """Reads a Hugging Face ``config.json``.

        Raises:
            ValueError: it is missing, damaged, or describes a model that this runtime does not run.
        """
        try:
            raw = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(f"{path.parent} is no model directory: it has no {path.name}") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as e:
            raise ValueError(f"{path} is not valid JSON: {e}") from None
        if not isinstance(raw, dict) or raw.get("model_type") != "opt":
            kind = raw.get("model_type") if isinstance(raw, dict) else None
            raise ValueError(f"{path}: model_type is {kind!r}, but this runtime runs 'opt' alone")
        if (activation := raw.get("activation_function", "relu")) != "relu":
            raise ValueError(
                f"{path}: activation_function is {activation!r}; contextual sparsity needs 'relu'"
            )
        if missing := [name for name in _REQUIRED if name not in raw]:
            raise ValueError(f"{path} lacks {', '.join(missing)}")
        pre_norm = raw.get("do_layer_norm_before", True)
        try:
            return cls(
                **{ours: raw[theirs] for theirs, ours in _REQUIRED.items()},
                **{name: raw[name] for name in _OPTIONAL if name in raw},
                word_embed_proj_dim=raw.get("word_embed_proj_dim") or raw["hidden_size"],
                has_final_layer_norm=pre_norm and not raw.get("_remove_final_layer_norm", False),
                dtype=parse_dtype(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
            )
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def parse_dtype(name: str) -> torch.dtype:
    """``fp16``, ``bf16``, ``fp32`` or torch's own names."""
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"dtype={name!r} is unknown: use fp16, bf16 or fp32")
    return _DTYPES[name]


# OPT's published sizes (arXiv 2205.01068, table 1): hidden size, layers, heads. opt-350m is of another kind.
_PUBLISHED = {
    "opt-125m": (768, 12, 12),
    "opt-1.3b": (2048, 24, 32),
    "opt-2.7b": (2560, 32, 32),
    "opt-6.7b": (4096, 32, 32),
    "opt-13b": (5120, 40, 40),
    "opt-30b": (7168, 48, 56),
    "opt-66b": (9216, 64, 72),
    "opt-175b": (12288, 96, 96),
}


def published_config(name: str) -> OPTConfig:
    """The architecture of a published size, ``opt-125m`` to ``opt-175b``.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in _PUBLISHED:
        raise ValueError(f"shape={name!r} is unknown: use {', '.join(_PUBLISHED)}")
    hidden_size, num_layers, num_heads = _PUBLISHED[name]
    return OPTConfig(
        vocab_size=50272,
        hidden_size=hidden_size,
        ffn_dim=4 * hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_position_embeddings=2048,
        word_embed_proj_dim=hidden_size,
    )
