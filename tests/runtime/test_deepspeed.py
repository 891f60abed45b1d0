"""DeepSpeed's automatic tensor parallelism as a second, independent oracle."""

import pytest
import torch

from models import load_reference, make_model
from parity import PROMPTS, ours
from ranks import run_ranks

NEW_TOKENS = 30


def deepspeed_logits(tp, directory, sequences):
    """DeepSpeed's logits of every whole sequence of token ids."""
    import deepspeed

    # its shared-memory all-reduce needs DeepSpeed's own launcher: gloo does without
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    model = deepspeed.init_inference(
        load_reference(directory),
        dtype=torch.float32,
        tensor_parallel={"tp_size": tp.size},
        replace_with_kernel_inject=False,
    )
    fc1 = model.module.model.decoder.layers[0].fc1
    assert fc1.weight.shape[0] == 64 // tp.size  # it does split the model
    with torch.no_grad():
        return [model(torch.tensor([ids])).logits[0] for ids in sequences]


def test_logits_equal_deepspeed_autotp_on_two_ranks(tmp_path, demo_tokenizer, monkeypatch):
    pytest.importorskip("deepspeed", reason="the extra 'baselines' is not installed")
    for name, value in {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    directory = make_model(tmp_path)
    found = run_ranks(2, ours, directory, "fp32", NEW_TOKENS)[0]
    prompts = [demo_tokenizer(prompt).input_ids for prompt in PROMPTS]
    sequences = [p + new for p, new in zip(prompts, found.token_ids, strict=True)]
    for logits in run_ranks(2, deepspeed_logits, directory, sequences):
        for i, whole in enumerate(logits):
            torch.testing.assert_close(found.logits[i], whole[-NEW_TOKENS - 1 : -1], atol=1e-4, rtol=0)
