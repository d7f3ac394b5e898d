"""The one step: schedule, propose, forward, verify, commit, emit.

Prefill is a step with a prompt chunk in place of a tree; plain decoding is a step with an empty
draft. There is no other loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from foretoken.core.draft import Draft, merge_drafts
from foretoken.core.ranking import argmax_ids
from foretoken.core.verdict import Verdict
from foretoken.drafters.base import DraftContext, Drafter
from foretoken.engine.request import Emission
from foretoken.engine.scheduler import Scheduler, Work
from foretoken.errors import DrafterError
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
    emissions = [
        work.request.accept(verdict, draft)
        for work, draft, verdict in zip(works, drafts, verdicts, strict=True)
        if verdict is not None
    ]
    tell_drafters(parts.drafters, works, verdicts)
    return emissions


def propose(parts: StepParts, works: Sequence[Work]) -> list[Draft]:
    """Return a draft per work: the union of what the request's drafters propose, pruned."""
    contexts = {
        index: DraftContext(
            request_id=work.request.request_id,
            token_ids=work.request.token_ids,
            sampler=work.request.sampler,
            budget=work.budget,
        )
        for index, work in enumerate(works)
        if work.budget is not None and not work.budget.is_empty
    }
    proposed: dict[int, list[Draft]] = {index: [] for index in contexts}
    for label, drafter in parts.drafters.items():
        indices = [index for index in contexts if label in works[index].request.drafters]
        if not indices:
            continue
        drafts = drafter.propose([contexts[index] for index in indices])
        if len(drafts) != len(indices):
            raise _violation(label, f"{len(drafts)} drafts for {len(indices)} contexts")
        for index, draft in zip(indices, drafts, strict=True):
            _check_draft(label, draft, contexts[index], parts.target.info.vocab_size)
            proposed[index].append(draft)
    return [
        _combine(proposed.get(index, []), work.request.token_ids[-1], work)
        for index, work in enumerate(works)
    ]


def verify(
    verifier: Verifier, works: Sequence[Work], drafts: Sequence[Draft], output: ForwardOutput
) -> list[Verdict | None]:
    """Return a verdict per work; None where the prompt goes on."""
    is_argmax = any(work.budget is not None and work.request.sampler.is_argmax for work in works)
    # The step's one wait for the device; samplers that need more look at the rows one by one.
    largest_ids = argmax_ids(output.logits) if is_argmax else []
    verdicts: list[Verdict | None] = []
    start = 0
    for work, draft in zip(works, drafts, strict=True):
        if work.budget is None:
            verdicts.append(None)
            continue
        stop = start + len(draft.tree)
        rows = TargetRows(output.logits[start:stop], largest_ids[start:stop])
        request = work.request
        verdicts.append(verifier.verify(draft, rows, request.sampler, request.token_ids))
        start = stop
    return verdicts


def tell_drafters(
    drafters: Mapping[str, Drafter], works: Sequence[Work], verdicts: Sequence[Verdict | None]
) -> None:
    """Let every drafter of a request know what was kept, whether or not it drafted."""
    for work, verdict in zip(works, verdicts, strict=True):
        if verdict is not None:
            for label in work.request.drafters:
                drafters[label].commit(work.request.request_id, verdict)


def _combine(drafts: Sequence[Draft], root_id: int, work: Work) -> Draft:
    if not drafts or work.budget is None:
        return Draft.empty(root_id)
    merged = drafts[0] if len(drafts) == 1 else merge_drafts(list(drafts))
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
    sequence, num_known = work.sequence, work.num_known
    start, root = sequence.num_cached, num_known - 1
    known = work.request.token_ids[start : start + num_known]
    return Segment(
        sequence,
        [*known, *draft.tree.token_ids[1:]] if work.budget is not None else known,
        [*range(-1, root), *(parent + root for parent in draft.tree.parents[1:])],
    )


def _rows(batch: RaggedBatch, works: Sequence[Work], drafts: Sequence[Draft]) -> list[int]:
    return [
        start + work.num_known - 1 + node
        for start, work, draft in zip(batch.starts[:-1], works, drafts, strict=True)
        if work.budget is not None
        for node in range(len(draft.tree))
    ]


def _kept(work: Work, verdict: Verdict | None) -> list[int]:
    path = () if verdict is None else verdict.path
    return [*range(work.num_known), *(work.num_known - 1 + node for node in path)]
