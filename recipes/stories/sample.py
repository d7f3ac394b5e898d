"""Sample many texts from a model at once."""

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM


def choose(logits: Tensor, temperatures: Tensor, random: torch.Generator) -> Tensor:
    """One token a row: the most likely where the temperature is 0, a sample elsewhere."""
    safe = temperatures.clamp(min=1e-4).unsqueeze(1)
    weights = torch.softmax(logits.float() / safe, dim=-1)
    sampled = torch.multinomial(weights, 1, generator=random).squeeze(1)
    return torch.where(temperatures > 0, sampled, logits.argmax(dim=-1))


@torch.no_grad()
def continue_rows(
    model: LlamaForCausalLM,
    prompts: Tensor,
    temperatures: Tensor,
    new_tokens: int,
    random: torch.Generator,
) -> list[list[int]]:
    """Prompt and continuation of every row of equally long prompts, up to EOS."""
    model.eval()
    end = model.config.eos_token_id
    rows = [row.tolist() for row in prompts]
    alive = torch.arange(len(rows))
    cache, fed = DynamicCache(config=model.config), prompts
    for _ in range(new_tokens):
        output = model(input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=1)
        tokens = choose(output.logits[:, -1], temperatures[alive], random)
        for index, token in zip(alive.tolist(), tokens.tolist(), strict=True):
            rows[index].append(token)
        going = tokens != end
        if not going.any():
            break
        if going.float().mean() < 0.8 or going.sum() < 8:
            kept = going.nonzero().squeeze(1)
            cache.batch_select_indices(kept)
            alive, tokens = alive[kept], tokens[kept]
        fed = tokens.unsqueeze(1)
    return [_until(row, end) for row in rows]


def _until(row: list[int], end: int) -> list[int]:
    """The row up to and with the first `end`."""
    return row[: row.index(end) + 1] if end in row else row


def sample_texts(
    model: LlamaForCausalLM,
    stories: list[list[int]],
    tokens: int,
    temperatures: list[float],
    seed: int,
    *,
    batch: int = 192,
    new_tokens: int = 320,
) -> list[list[int]]:
    """At least `tokens` tokens of continuations of openings of 1 to 16 tokens of `stories`."""
    random = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    total = 0
    while total < tokens:
        length = int(torch.randint(1, 17, (1,), generator=random))
        chosen = torch.randint(0, len(stories), (batch,), generator=random).tolist()
        prompts = torch.tensor([stories[index][:length] for index in chosen])
        picks = torch.randint(0, len(temperatures), (batch,), generator=random)
        heat = torch.tensor(temperatures)[picks]
        if length < 4:  # few distinct openings: the most likely text would be the same again
            heat = heat.clamp(min=1.0)
        fresh = continue_rows(model, prompts, heat, new_tokens, random)
        rows.extend(fresh)
        total += sum(map(len, fresh))
        print(f"sampled {total} of {tokens} tokens", flush=True)
    return rows
