"""Small random OPT models in Hugging Face format, made by the real library."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import OPTConfig, OPTForCausalLM

from dejavu.runtime.config import published_config
from dejavu.runtime.weights import find_model

BASE = {
    "vocab_size": 4096,  # the demo's, so that its tokenizer serves
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
KINDS = {
    "pre-norm": {},
    "untied": {"tie_word_embeddings": False},
    "post-norm with projections": {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "no bias, no affine": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "no final norm, odd vocabulary": {"_remove_final_layer_norm": True, "vocab_size": 4099},
}


def make_model(directory: Path, seed: int = 0, **overrides) -> Path:
    """Saves a random model (fp32, one safetensors file) with the demo's tokenizer beside it."""
    model = random_model(seed, **overrides)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(find_model("demo") / name, directory)
    return directory


def model_of(kind: str, folder: Path) -> Path:
    """The directory of the embedded model (``demo``) or of a random one of a kind, made in ``folder``."""
    return find_model("demo") if kind == "demo" else make_model(folder, **KINDS[kind])


def random_model(seed: int = 0, **overrides) -> OPTForCausalLM:
    """Every parameter is random, biases and norms too: a bias that is zero tests nothing."""
    torch.manual_seed(seed)
    model = OPTForCausalLM(OPTConfig(**{**BASE, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.25)
            if "layer_norm.weight" in name:
                parameter.add_(1)
    return model


def windows_of(n: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """Random windows ``[n, tokens + 1]`` of the demo tokenizer's vocabulary."""
    return torch.randint(4, 4000, (n, tokens + 1), generator=torch.Generator().manual_seed(seed))


def load_reference(directory: Path, dtype=torch.float32) -> OPTForCausalLM:
    """Hugging Face's own model: plain attention in fp32, SDPA in 16 bits, where the plain one overflows."""
    attention = "eager" if dtype == torch.float32 else "sdpa"
    return OPTForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation=attention).eval()


def tiny_opt(hidden_size, **sizes):
    """The architecture of opt-125m at another width, with 16 heads."""
    return replace(
        published_config("opt-125m"),
        hidden_size=hidden_size,
        ffn_dim=4 * hidden_size,
        num_heads=16,
        word_embed_proj_dim=hidden_size,
        **sizes,
    )
