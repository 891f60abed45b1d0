import json

import pytest
import torch

from dejavu.runtime.config import OPTConfig, parse_dtype
from models import BASE

GOOD = {**BASE, "model_type": "opt", "torch_dtype": "float16"}


def read(tmp_path, **changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not None}))
    return OPTConfig.from_json(path)


def test_reads_hugging_faces_names_and_defaults(tmp_path):
    config = read(tmp_path, num_hidden_layers=3, word_embed_proj_dim=None)
    assert (config.num_layers, config.num_heads, config.head_dim) == (3, 4, 8)
    assert config.word_embed_proj_dim == config.hidden_size
    assert config.do_layer_norm_before and config.has_final_layer_norm and config.tie_word_embeddings
    assert config.dtype == torch.float16


def test_post_norm_models_have_no_final_norm(tmp_path):
    assert not read(tmp_path, do_layer_norm_before=False).has_final_layer_norm
    assert not read(tmp_path, _remove_final_layer_norm=True).has_final_layer_norm


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"ffn_dim": "wide"}, "ffn_dim='wide' is not a positive integer"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not divisible by num_heads=5"),
        ({"torch_dtype": "int8"}, "dtype='int8' is unknown"),
    ],
)
def test_says_what_is_wrong_and_in_which_file(tmp_path, changes, message):
    with pytest.raises(ValueError, match=f"config.json.*{message}"):
        read(tmp_path, **changes)


@pytest.mark.parametrize("text", ["{", "\xff", "[]", "3"])
def test_refuses_what_is_no_json_object(tmp_path, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"config\.json"):
        OPTConfig.from_json(tmp_path / "config.json")


def test_check_tp_says_which_sizes_would_work(tmp_path):
    config = read(tmp_path, num_attention_heads=8, ffn_dim=60)
    config.check_tp(4)
    with pytest.raises(ValueError, match=r"num_heads=8 and ffn_dim=60 .* over 8 ranks; 1, 2, 4 would work"):
        config.check_tp(8)


def test_dtypes_by_their_short_names():
    assert parse_dtype("bf16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype='fp8'"):
        parse_dtype("fp8")
