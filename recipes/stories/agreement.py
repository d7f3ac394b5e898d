"""How well a draft foresees its target, without an engine: agreement, overlap, cost of a pass."""

import statistics
import time
from collections import Counter
from dataclasses import dataclass

import torch
from corpus import Story
from measure import pad
from sample import continue_rows
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

# A tree of 8 nodes, as paths of ranks in the draft's order: a chain of 5, its side branches.
TREE = ((0,), (0, 0), (0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0, 0), (1,), (0, 1), (1, 0))
DEPTH = 6


@dataclass(frozen=True)
class Text:
    """The target's text behind one opening: all tokens, and where its own begin."""

    ids: list[int]
    own: int


def openings(stories: list[Story], count: int, seed: int) -> list[str]:
    """The first 6 to 12 words of `count` stories, all different, a quarter alike at most."""
    random = torch.Generator().manual_seed(seed)
    found: list[str] = []
    starts: Counter[str] = Counter()
    for index in torch.randperm(len(stories), generator=random).tolist():
        words = stories[index].text.split("\n")[0].split(" ")
        length = 6 + int(torch.randint(0, 7, (1,), generator=random))
        opening, start = " ".join(words[:length]), " ".join(words[:3])
        if len(words) > length and opening not in found and starts[start] < count // 4:
            found.append(opening)
            starts[start] += 1
        if len(found) == count:
            break
    return found


def texts(
    target: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    temperature: float,
    new_tokens: int = 128,
) -> list[Text]:
    """The target's continuation of every prompt."""
    random = torch.Generator().manual_seed(5)
    groups: dict[int, list[list[int]]] = {}
    for ids in tokenizer(prompts)["input_ids"]:
        groups.setdefault(len(ids), []).append(ids)
    found = []
    for length, rows in sorted(groups.items()):
        heat = torch.full((len(rows),), temperature)
        for ids in continue_rows(target, torch.tensor(rows), heat, new_tokens, random):
            found.append(Text(ids, length))
    return found


@torch.no_grad()
def distributions(model: LlamaForCausalLM, found: list[Text]) -> list[Tensor]:
    """The model's distribution of every own token of every text."""
    rows = pad([text.ids for text in found], 0)
    logits = torch.cat([model(input_ids=part, use_cache=False).logits for part in rows.split(16)])
    return [
        torch.softmax(logits[i, text.own - 1 : len(text.ids) - 1].float(), dim=-1)
        for i, text in enumerate(found)
    ]


def ranks(q: Tensor, tokens: Tensor) -> list[int]:
    """The place of every token in the draft's order at its position."""
    own = q.gather(1, tokens.unsqueeze(1))
    return (q > own).sum(1).tolist()


def tokens_per_step(text_ranks: list[list[int]], nodes: tuple[tuple[int, ...], ...]) -> float:
    """Greedy tokens per target pass with a fixed tree, walked along the target's texts."""
    tree, tokens, passes = set(nodes), 0, 0
    for row in text_ranks:
        at = 0
        while at < len(row):
            taken = 0
            while at + taken < len(row) and tuple(row[at : at + taken + 1]) in tree:
                taken += 1
            at += taken + 1
            tokens += min(taken + 1, len(row) - (at - taken - 1))
            passes += 1
    return tokens / passes


def chain_yield(overlap: Tensor, depth: int) -> float:
    """Expected tokens of a pass over a chain of drafts, started at every position in turn."""
    total = torch.ones(max(0, len(overlap) - depth))
    running = torch.ones_like(total)
    for step in range(depth):
        running = running * overlap[step : step + len(total)]
        total = total + running
    return total.mean().item() if len(total) else 1.0


def compare(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
) -> dict[str, float]:
    """Agreement on the target's greedy texts, overlap on its samples."""
    greedy = texts(target, tokenizer, prompts, 0.0)
    draft_greedy = distributions(draft, greedy)
    placed = [
        ranks(q, torch.tensor(text.ids[text.own :]))
        for text, q in zip(greedy, draft_greedy, strict=True)
    ]
    flat = [rank for row in placed for rank in row]
    result = {f"greedy_top{k}": sum(r < k for r in flat) / len(flat) for k in (1, 2, 4, 8)}
    chain = tuple((0,) * (depth + 1) for depth in range(DEPTH))
    result["greedy_tokens_per_step_chain"] = tokens_per_step(placed, chain)
    result["greedy_tokens_per_step_tree8"] = tokens_per_step(placed, TREE)
    for temperature in (0.7, 1.0):
        name = f"t{temperature}"
        sampled = texts(target, tokenizer, prompts, temperature)
        p = _at_temperature(distributions(target, sampled), temperature)
        q = _at_temperature(distributions(draft, sampled), temperature)
        overlaps = [torch.minimum(a, b).sum(1) for a, b in zip(p, q, strict=True)]
        result[f"{name}_overlap"] = torch.cat(overlaps).mean().item()
        for k in (2, 4):
            best = [a.gather(1, b.topk(k, 1).indices).sum(1) for a, b in zip(p, q, strict=True)]
            result[f"{name}_top{k}_mass"] = torch.cat(best).mean().item()
        yields = [chain_yield(overlap, DEPTH) for overlap in overlaps if len(overlap) > DEPTH]
        result[f"{name}_tokens_per_step_chain"] = statistics.fmean(yields)
    return {key: round(value, 4) for key, value in result.items()}


def _at_temperature(rows: list[Tensor], temperature: float) -> list[Tensor]:
    if temperature == 1.0:
        return rows
    return [torch.softmax(row.clamp(min=1e-20).log() / temperature, dim=-1) for row in rows]


@torch.no_grad()
def pass_milliseconds(model: LlamaForCausalLM, repeats: int = 80, context: int = 100) -> float:
    """Median time of a one-token pass of one row over a cache of `context` tokens."""
    model.eval()
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.full((1, context), 5), past_key_values=cache, use_cache=True)
    token = torch.tensor([[7]])
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        model(input_ids=token, past_key_values=cache, use_cache=True)
        times.append(time.perf_counter() - began)
        cache.crop(-1)
    return statistics.median(times) * 1000


def cost_ratio(target: LlamaForCausalLM, draft: LlamaForCausalLM) -> dict[str, float]:
    """Time of a target pass over time of a draft pass: the median of alternating rounds."""
    pairs = [(pass_milliseconds(target), pass_milliseconds(draft)) for _ in range(5)]
    pairs.sort(key=lambda pair: pair[0] / pair[1])
    slow, fast = pairs[len(pairs) // 2]
    return {
        "target_ms": round(slow, 3),
        "draft_ms": round(fast, 3),
        "ratio": round(slow / fast, 2),
    }
