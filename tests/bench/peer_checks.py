"""What the tests of all peers share: a reference, and a spec."""

from pathlib import Path

import torch
import transformers

from foretoken.bench.peers.base import PeerSpec

PROMPT = [1, 5, 9, 3, 7, 2]


def make_spec(target, draft, work_dir, **changes):
    values = {
        "model": Path(target),
        "draft": None if draft is None else Path(draft),
        "dtype": "float32",
        "threads": 1,
        "num_draft_tokens": 4,
        "work_dir": Path(work_dir),
    }
    return PeerSpec(**{**values, **changes})


@torch.inference_mode()
def greedy_reference(folder, prompt_ids, num_tokens):
    """Continue with transformers in float32, without a cache and past any end of sequence."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    token_ids = list(prompt_ids)
    for _ in range(num_tokens):
        token_ids.append(int(model(torch.tensor([token_ids])).logits[0, -1].argmax()))
    return token_ids[len(prompt_ids) :]


def greedy(peer, num_tokens, *, speculative, prompt_ids=PROMPT):
    return peer.generate(
        prompt_ids, max_new_tokens=num_tokens, temperature=0.0, seed=0, speculative=speculative
    )


def sampled(peer, seed, *, speculative, num_tokens=30):
    output = peer.generate(
        PROMPT, max_new_tokens=num_tokens, temperature=1.0, seed=seed, speculative=speculative
    )
    return output.token_ids
