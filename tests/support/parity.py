"""Greedy text and logits, ours and Hugging Face's, of the same prompts."""

from dataclasses import dataclass

import torch

from dejavu.runtime.engine import Engine
from dejavu.runtime.sampling import SamplingParams
from models import load_reference

NEW_TOKENS = 200
PROMPTS = ("It was a dark and stormy night, and the rain", "Once", "The old man looked at the sea.")


@dataclass
class Continuation:
    """``token_ids [B][new]`` and ``logits [B, new, V]`` from which each was taken."""

    token_ids: list[list[int]]
    logits: torch.Tensor


def ours(tp, directory, dtype="fp32", new_tokens=NEW_TOKENS, forced=None) -> Continuation:
    """Continues the prompts with our engine; ``forced [B][new]`` replaces the tokens it would choose."""
    engine = Engine.from_pretrained(str(directory), tp=tp, dtype=dtype, cuda_graph=False)
    params = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
    seen = []
    head = engine.model.logits

    def record(x):
        logits = head(x)
        seen.append(logits.cpu())
        return logits

    engine.model.logits = record
    ids = [engine.tokenize(prompt, params) for prompt in PROMPTS]
    state = engine.prefill(ids, [params] * len(ids))
    tokens = [state.tokens.tolist()]
    for i in range(new_tokens - 1):
        if forced is not None:
            with torch.inference_mode():
                state.tokens.copy_(torch.tensor([row[i] for row in forced]))
        engine.decode_step(state)
        tokens.append(state.tokens.tolist())
    return Continuation([list(row) for row in zip(*tokens, strict=True)], torch.stack(seen, dim=1))


def ours_in_every_dtype(tp, directory, token_ids) -> dict[str, Continuation]:
    """Free in fp32; in 16 bits the given tokens are forced, so that all logits are of the same text."""
    half = {dtype: ours(tp, directory, dtype, forced=token_ids) for dtype in ("fp16", "bf16")}
    return {"fp32": ours(tp, directory), **half}


def hugging_face(
    directory, tokenizer, dtype=torch.float32, device="cpu", new_tokens=NEW_TOKENS, forced=None
) -> Continuation:
    """Continues the prompts in one left-padded batch; logits from one pass over each whole sequence."""
    model = load_reference(directory, dtype).to(device)
    tokenizer.padding_side = "left"
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True).to(device)
    if forced is None:
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=1,
        )
        tokens = out[:, batch.input_ids.shape[1] :]
    else:
        tokens = torch.tensor(forced, device=device)
    logits = []
    for row, mask, new in zip(batch.input_ids, batch.attention_mask, tokens, strict=True):
        whole = torch.cat([row[mask.bool()], new])[None]
        with torch.no_grad():
            logits.append(model(whole).logits[0, -len(new) - 1 : -1].float().cpu())
    return Continuation(tokens.tolist(), torch.stack(logits))
