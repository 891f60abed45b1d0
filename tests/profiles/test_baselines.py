"""The engines that `dejavu bench decode` compares with, on the CPU."""

import sys
from types import SimpleNamespace

import pytest
import torch

from dejavu.parallel.groups import TPGroup
from dejavu.profiles import baselines, timing
from dejavu.profiles.timing import EnergyMeter, time_decode
from dejavu.runtime.config import OPTConfig, published_config
from ranks import run_ranks

SIZES = {"vocab_size": 512, "hidden_size": 32, "ffn_dim": 64, "num_layers": 2, "num_heads": 4}
CPU = torch.device("cpu")
RUN = {"batch": 2, "prompt_len": 9, "new_tokens": 6, "dtype": torch.float32}


def tiny(**overrides):
    sizes = {**SIZES, "max_position_embeddings": 64, "word_embed_proj_dim": 32, **overrides}
    return OPTConfig(**sizes)


def lively(model):
    """Weights large enough that tokens differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(12)
    return model


@torch.no_grad()
def tokens_of(run, steps=5):
    """What the timed calls decode, after a run that they start over from."""
    run.prefill()
    run.step()
    run.prefill()
    tokens = [run.tokens]
    for _ in range(steps):
        run.step()
        tokens.append(run.tokens)
    return torch.cat(tokens, dim=1)


def generated(model, prompt, new_tokens=6):
    """Hugging Face's own greedy loop."""
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, do_sample=False,
        eos_token_id=-1, pad_token_id=1,
    )  # fmt: skip
    return out[:, prompt.shape[1] :]


def without_inductor(monkeypatch):
    """Traces as the product does, in one graph, but compiles nothing."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, mode: compiler(fn, backend="eager", fullgraph=True))


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False, "has_final_layer_norm": False}])
@pytest.mark.parametrize("kind", [baselines.Decode, baselines.CompiledDecode])
def test_the_timed_loop_decodes_what_generate_does(kind, overrides, monkeypatch):
    without_inductor(monkeypatch)
    config = tiny(**overrides)
    model = lively(baselines.fill(baselines.meta_model(config, torch.float32).to_empty(device=CPU)))
    prompt = baselines.random_prompt(config, 2, 9, CPU)
    expected = generated(model, prompt)
    assert len(expected.unique()) > 2
    run = kind(model, prompt, 15)
    assert torch.equal(tokens_of(run), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(tokens_of(run), expected)


def test_hf_measures_every_step_after_the_first_token(monkeypatch):
    without_inductor(monkeypatch)
    for compiled in (False, True):
        found = baselines.measure_hf(tiny(), **RUN, device=CPU, compiled=compiled)
        assert len(found.steps_ms) == 5 and min(*found.steps_ms, found.ttft_ms) > 0
        assert found.peak_gib is None and found.joules_per_token is None


def test_an_hf_config_has_the_sizes_of_ours():
    theirs = baselines.hf_config(published_config("opt-6.7b"))
    assert (theirs.hidden_size, theirs.ffn_dim, theirs.num_hidden_layers) == (4096, 16384, 32)
    weights = baselines.meta_model(published_config("opt-66b"), torch.bfloat16)
    assert {p.device.type for p in weights.parameters()} == {"meta"}
    assert {p.dtype for p in weights.parameters()} == {torch.bfloat16}
    assert 65e9 < sum(p.numel() for p in weights.parameters()) < 67e9


def deepspeed_run(tp, config):
    """Tokens of DeepSpeed's ranks, this rank's weights, and what is measured."""
    model = baselines.meta_model(config, torch.float32)
    engine = baselines.split_by_deepspeed(model, torch.float32, tp)
    lively(engine.module)
    prompt = baselines.random_prompt(config, 2, 9, CPU)
    tokens = tokens_of(baselines.Decode(engine, prompt, 15))
    weights = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    return tokens, weights, baselines.measure_deepspeed(config, **RUN, tp=tp)


@pytest.mark.parametrize("size", [1, 2])
def test_deepspeed_decodes_with_shards_made_on_their_ranks(size, monkeypatch):
    pytest.importorskip("deepspeed", reason="the extra 'baselines' is not installed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    config = tiny(tie_word_embeddings=False)
    ranks = run_ranks(size, deepspeed_run, config)
    whole = baselines.meta_model(config, torch.float32).to_empty(device=CPU)
    sharded = 0
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            parts = [weights[name] for _, weights, _ in ranks]
            split = [i for i, n in enumerate(parameter.shape) if n != parts[0].shape[i]]
            parameter.copy_(torch.cat(parts, dim=split[0]) if split else parts[0])
            sharded += bool(split)
    # all weights of a layer, its biases but the row-parallel two, and the head
    assert sharded == (0 if size == 1 else 2 * (6 + 4) + 1)
    expected = generated(whole, baselines.random_prompt(config, 2, 9, CPU))
    assert len(expected.unique()) > 2
    for tokens, _, measured in ranks:
        assert torch.equal(tokens, expected)
        assert len(measured.steps_ms) == 5


def test_what_cannot_be_measured_is_one_line(monkeypatch):
    with pytest.raises(ValueError, match="takes 68 positions; the model has max_position_embeddings=64"):
        baselines.measure_hf(tiny(), **{**RUN, "new_tokens": 60}, device=CPU)
    with pytest.raises(ValueError, match="new_tokens=1: need 1, 1 and 2 at least"):
        baselines.measure_deepspeed(tiny(), **{**RUN, "new_tokens": 1}, tp=TPGroup())
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"^engine deepspeed needs: pip install 'dejavu\[baselines\]'$"):
        baselines.measure_deepspeed(tiny(), **RUN, tp=TPGroup())
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    with pytest.raises(ValueError, match="hf needs 122 GiB a GPU for the weights alone, this one has 80 GiB"):
        large = {**RUN, "dtype": torch.bfloat16, "device": torch.device("cuda", 0)}
        baselines.measure_hf(published_config("opt-66b"), **large)


class NVML:
    """A GPU whose counter has gone on by 5 J each time it is read."""

    NVMLError = type("NVMLError", (Exception,), {})

    def __init__(self, known="GPU-b10e-1"):
        self.known, self.millijoules, self.users = known, 0, 0

    def nvmlInit(self):  # noqa: N802
        self.users += 1

    def nvmlShutdown(self):  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        if uuid != self.known:
            raise self.NVMLError
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        self.millijoules += 5000
        return self.millijoules


@pytest.mark.parametrize("uuid, joules", [("b10e-1", 5.0), ("b10e-2", None)])
def test_energy_is_that_of_the_gpu_with_torchs_uuid(uuid, joules, monkeypatch):
    nvml = NVML()
    monkeypatch.setattr(timing, "import_module", lambda _: nvml)
    monkeypatch.setattr(timing, "_synchronize", lambda _: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    with EnergyMeter(torch.device("cuda", 0)) as meter:
        pass
    assert meter.joules == joules and nvml.users == 0


def test_without_nvml_there_is_no_energy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(timing, "_synchronize", lambda _: None)
    with EnergyMeter(torch.device("cuda", 0)) as meter:
        pass
    assert meter.joules is None


def test_a_decode_is_prefilled_anew_before_what_is_timed():
    calls = []
    found = time_decode(
        lambda: calls.append("P"), lambda: calls.append("s"), batch=3, new_tokens=4, device=CPU, warm_up=2
    )
    assert "".join(calls) == "PssPPPsss" and len(found.steps_ms) == 3
