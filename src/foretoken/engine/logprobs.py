"""Log-probabilities of emitted tokens and of prompts, from the rows that chose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.tree import ROOT
from foretoken.core.verdict import Verdict


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely one token was, and what else could have stood there.

    Args:
        token_id: The token.
        logprob: Its natural log-probability; minus infinity if a control ruled it out.
        top: The likeliest tokens with theirs, likeliest first, ties to the lowest id.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def output_logprobs(
    rows: Tensor,  # [N, V]
    verdict: Verdict,
    sampler: Sampler,
    params: SamplingParams,
    token_ids: Sequence[int],
) -> list[TokenLogprobs]:
    """Return one entry per token of a verdict.

    A row's values depend on its own bits alone, so that they are the same however the row's
    token was drafted.

    Args:
        rows: The target's logits at the draft's nodes.
        verdict: What was kept of the draft.
        sampler: Applies the request's controls, if they count.
        params: What the request asks; `logprobs` is set.
        token_ids: Prompt and output before the verdict.
    """
    found = []
    nodes = (ROOT, *verdict.path)
    for place, (node, token_id) in enumerate(zip(nodes, verdict.token_ids, strict=True)):
        row = rows[node]
        if params.logprobs_mode == "processed":
            path = verdict.token_ids[:place]
            row = sampler.scores(row.unsqueeze(0), token_ids, [path])[0]
        found.append(row_logprobs(row, token_id, params.logprobs or 0))
    return found


def row_logprobs(row: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Return what one row of scores, [V], says of a token and of the `num_top` likeliest."""
    logprobs = row.double().log_softmax(dim=-1)
    # A stable sort, because topk leaves open which of equals comes first.
    order = torch.sort(logprobs, descending=True, stable=True).indices[:num_top].tolist()
    top = tuple((int(index), float(logprobs[index])) for index in order)
    return TokenLogprobs(token_id, float(logprobs[token_id]), top)
