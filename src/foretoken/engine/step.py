"""The one step: schedule, propose, forward, verify, commit, emit.

Prefill is a step with a prompt chunk in place of a tree; plain decoding is a step with an empty
draft. There is no other loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw, merge_drafts
from foretoken.core.ranking import argmax_ids
from foretoken.core.verdict import Verdict
from foretoken.drafters.base import DraftContext, Drafter
from foretoken.engine.logprobs import TokenLogprobs, output_logprobs, row_logprobs
from foretoken.engine.request import Emission
from foretoken.engine.scheduler import Scheduler, Work
from foretoken.errors import DrafterError, RequestError
from foretoken.models.adapter import ForwardOutput, LanguageModel
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import KVCache
from foretoken.verifiers.base import TargetRows, Verifier


@dataclass(frozen=True, slots=True)
class StepParts:
    """What a step is made of; none of it changes from step to step."""

    target: LanguageModel
    cache: KVCache
    scheduler: Scheduler
    drafters: Mapping[str, Drafter]
    verifier: Verifier
    draws: Mapping[str, SiblingDraw]  # how each drafter's siblings are drawn when sampling


def run_step(parts: StepParts) -> list[Emission]:
    """Advance every scheduled request by one pass of the target; at least a token each."""
    works = parts.scheduler.schedule()
    drafts = propose(parts, works)
    with parts.cache.speculate([work.sequence for work in works]) as cache:
        batch = parts.target.batch(
            cache, [_segment(w, d) for w, d in zip(works, drafts, strict=True)]
        )
        output = parts.target.forward(batch, _rows(batch, works, drafts))
        verdicts = verify(parts.verifier, works, drafts, output)
        cache.commit([(w.sequence, _kept(w, v)) for w, v in zip(works, verdicts, strict=True)])
    # The cache has moved on, so requests do too before anything of the drafters' can fail.
    emissions = emit(works, drafts, verdicts, output)
    tell_drafters(parts.drafters, works, verdicts)
    return emissions


def propose(parts: StepParts, works: Sequence[Work]) -> list[Draft]:
    """Return a draft per work: the union of what the request's drafters propose, pruned."""
    budgets = {
        index: work.budget
        for index, work in enumerate(works)
        if work.budget is not None and not work.budget.is_empty
    }
    proposed: dict[int, list[Draft]] = {index: [] for index in budgets}
    for place, (label, drafter) in enumerate(parts.drafters.items()):
        indices = [index for index in proposed if label in works[index].request.drafters]
        if not indices:
            continue
        contexts = [
            _context(works[index], budgets[index], parts.draws[label], place) for index in indices
        ]
        drafts = drafter.propose(contexts)
        if len(drafts) != len(indices):
            raise _violation(label, f"{len(drafts)} drafts for {len(indices)} contexts")
        for index, context, draft in zip(indices, contexts, drafts, strict=True):
            _check_draft(label, draft, context, parts.target.info.vocab_size)
            proposed[index].append(draft.renamed(label.partition("#")[0], label))
    return [
        _combine(proposed.get(index, []), work.request.token_ids[-1], work)
        for index, work in enumerate(works)
    ]


def verify(
    verifier: Verifier, works: Sequence[Work], drafts: Sequence[Draft], output: ForwardOutput
) -> list[Verdict | None]:
    """Return a verdict per work; None where the prompt goes on or the request has failed."""
    is_argmax = any(work.budget is not None and work.request.sampler.is_argmax for work in works)
    # The step's one wait for the device; samplers that need more look at the rows one by one.
    largest_ids = argmax_ids(output.logits) if is_argmax else []
    verdicts: list[Verdict | None] = []
    for work, draft, span in zip(works, drafts, _spans(works, drafts), strict=True):
        verdict = None
        if work.budget is not None:
            rows = TargetRows(output.logits[span], largest_ids[span])
            request = work.request
            try:
                verdict = verifier.verify(draft, rows, request.sampler, request.token_ids)
            except RequestError as error:
                request.sampler.fail(error, len(request.token_ids))
        verdicts.append(verdict)
    return verdicts


def emit(
    works: Sequence[Work],
    drafts: Sequence[Draft],
    verdicts: Sequence[Verdict | None],
    output: ForwardOutput,
) -> list[Emission]:
    """Give every request its tokens, or the error that ends it alone."""
    emissions = []
    spans = _spans(works, drafts)
    for work, draft, verdict, span in zip(works, drafts, verdicts, spans, strict=True):
        request = work.request
        _note_prompt_logprobs(work, output.logits, span.start)
        if verdict is None:
            if request.sampler.failure is not None:
                emissions.append(request.fail(request.sampler.failure))
        else:
            logprobs: list[TokenLogprobs] = []
            if request.params.logprobs is not None:
                rows, params = output.logits[span], request.params
                logprobs = output_logprobs(
                    rows, verdict, request.sampler, params, request.token_ids
                )
            emissions.append(request.accept(verdict, draft, logprobs))
    return emissions


def tell_drafters(
    drafters: Mapping[str, Drafter], works: Sequence[Work], verdicts: Sequence[Verdict | None]
) -> None:
    """Let every drafter of a request know what was kept, whether or not it drafted."""
    for work, verdict in zip(works, verdicts, strict=True):
        if verdict is not None:
            for label in work.request.drafters:
                drafters[label].commit(work.request.request_id, verdict)


def _context(work: Work, budget: DraftBudget, siblings: SiblingDraw, place: int) -> DraftContext:
    request = work.request
    is_greedy = request.sampler.is_greedy  # then every rule takes the likeliest, and any draft
    return DraftContext(
        request_id=request.request_id,
        token_ids=request.token_ids,
        sampler=request.sampler,
        budget=budget,
        siblings=SiblingDraw.DETERMINISTIC if is_greedy else siblings,
        drafter_index=place,
    )


def _combine(drafts: Sequence[Draft], root_id: int, work: Work) -> Draft:
    drafts = [draft for draft in drafts if draft.tree.num_draft_tokens]
    if not drafts or work.budget is None:
        return Draft.empty(root_id)
    merged = drafts[0] if len(drafts) == 1 else merge_drafts(drafts)
    return merged.prune(work.budget.max_nodes)


def _check_draft(label: str, draft: Draft, context: DraftContext, vocab_size: int) -> None:
    tree, budget = draft.tree, context.budget
    problem = None
    if tree.token_ids[0] != context.token_ids[-1]:
        problem = (
            f"a draft whose root is {tree.token_ids[0]}; the pending token is "
            f"{context.token_ids[-1]}"
        )
    elif tree.num_draft_tokens > budget.max_nodes or max(tree.depths) > budget.max_depth:
        problem = (
            f"a draft of {tree.num_draft_tokens} nodes and depth {max(tree.depths)}; "
            f"the bounds are {budget.max_nodes} and {budget.max_depth}"
        )
    elif budget.max_width is not None and max(map(len, tree.children)) > budget.max_width:
        problem = (
            f"a draft of width {max(map(len, tree.children))}; at most {budget.max_width} is taken"
        )
    elif min(tree.token_ids) < 0 or max(tree.token_ids) >= vocab_size:
        problem = f"a draft with token ids outside [0, {vocab_size}): {tree.token_ids}"
    if problem:
        raise _violation(label, problem)


def _violation(label: str, problem: str) -> DrafterError:
    return DrafterError(
        f"drafter {label!r} returned {problem}",
        hint="this is a bug in the drafter; leave it out until it is mended",
    )


# A work's rows are the tokens that stand, as a chain, then the draft below the last of them.
# The last known token is the root, so tree node n is row num_known - 1 + n of the segment.


def _segment(work: Work, draft: Draft) -> Segment:
    num_known, root = work.num_known, work.num_known - 1
    known = work.request.token_ids[work.start : work.start + num_known]
    return Segment(
        work.sequence,
        [*known, *draft.tree.token_ids[1:]] if work.budget is not None else known,
        [*range(-1, root), *(parent + root for parent in draft.tree.parents[1:])],
    )


def _num_rows(work: Work, draft: Draft) -> tuple[int, int]:
    """Return how many rows' logits are wanted: before the root, and of the tree from it on.

    Those before the root are for the log-probabilities of the prompt.
    """
    scores_prompt = work.request.params.prompt_logprobs is not None
    is_wanted = work.budget is not None or scores_prompt
    return work.num_known - 1 if scores_prompt else 0, len(draft.tree) if is_wanted else 0


def _rows(batch: RaggedBatch, works: Sequence[Work], drafts: Sequence[Draft]) -> list[int]:
    rows: list[int] = []
    for start, work, draft in zip(batch.starts[:-1], works, drafts, strict=True):
        root = start + work.num_known - 1
        num_before, num_nodes = _num_rows(work, draft)
        rows += range(root - num_before, root + num_nodes)
    return rows


def _spans(works: Sequence[Work], drafts: Sequence[Draft]) -> list[slice]:
    """Return where each work's tree nodes lie in the logits."""
    spans = []
    start = 0
    for work, draft in zip(works, drafts, strict=True):
        num_before, num_nodes = _num_rows(work, draft)
        start += num_before
        spans.append(slice(start, start + num_nodes))
        start += num_nodes
    return spans


def _note_prompt_logprobs(work: Work, logits: Tensor, root: int) -> None:
    """Add what this step's rows say about the tokens of the prompt that come after them."""
    request, num_top = work.request, work.request.params.prompt_logprobs
    if num_top is None:
        return
    first_row = root - (work.num_known - 1)
    last = min(work.start + work.num_known, request.num_prompt_ids - 1)
    for position in range(work.start + 1, last + 1):
        row = logits[first_row + position - 1 - work.start]
        entry = row_logprobs(row, request.token_ids[position], num_top)
        request.prompt_logprobs.append(entry)


def _kept(work: Work, verdict: Verdict | None) -> list[int]:
    path = () if verdict is None else verdict.path
    return [*range(work.num_known), *(work.num_known - 1 + node for node in path)]
