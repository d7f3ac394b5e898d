"""The one step: schedule, order, propose, choose, forward, verify, commit, emit.

Prefill is a step with a prompt chunk in place of a tree; plain decoding is a step with an empty
draft. The one other loop is `pipelined`, for targets that run loop by loop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw, merge_drafts
from foretoken.core.ranking import argmax_ids, best_tokens
from foretoken.core.verdict import Verdict
from foretoken.drafters.base import NO_TOP_IDS, DraftContext, Drafter, Outcome, StandingStates
from foretoken.engine.logprobs import TokenLogprobs, output_logprobs, row_logprobs
from foretoken.engine.request import Emission
from foretoken.engine.scheduler import Scheduler, Work
from foretoken.errors import DrafterError, RequestError
from foretoken.models.adapter import ForwardOutput, LanguageModel
from foretoken.models.batch import RaggedBatch, RowStates, Segment
from foretoken.models.cache import KVCache
from foretoken.models.partial import CachedPast
from foretoken.models.state_rows import take_rows
from foretoken.planner.base import Order, Planner, StepTimes
from foretoken.verifiers.base import TargetRows, Verifier


@dataclass(frozen=True, slots=True)
class StepParts:
    """What a step is made of; none of it changes from step to step."""

    target: LanguageModel
    cache: KVCache
    scheduler: Scheduler
    planner: Planner
    drafters: Mapping[str, Drafter]
    verifier: Verifier
    draws: Mapping[str, SiblingDraw]  # how each drafter's siblings are drawn when sampling
    hidden_layers: Mapping[str, tuple[int, ...]]  # of the drafters that ask for states
    sharer: str | None  # the drafter that runs most of the target's layers, if one does


class Scored(NamedTuple):
    """What a pass scores for one work.

    Args:
        work: Whose it is.
        draft: Its tree; the root alone in plain decoding.
        root: The root's row of the pass.
        span: Where the tree's rows lie in the logits; empty if nobody wants them.
    """

    work: Work
    draft: Draft
    root: int
    span: slice


class Loop(Protocol):
    """How an engine gets on: `WholePasses`, or one that is in the middle of several tokens."""

    def step(self, parts: StepParts) -> list[Emission]:
        """Advance every running request."""
        ...

    def forget(self, request_id: str) -> None:
        """Forget a request that has ended or lost its place; unknown ones are ignored."""
        ...

    def num_in_flight(self, request_id: str) -> int:
        """Return how many tokens of a request are on their way through the target."""
        ...


class WholePasses(Loop):
    """One pass of the target per step, which leaves nothing behind but tokens."""

    def step(self, parts: StepParts) -> list[Emission]:
        """Advance every running request by one pass; at least a token each."""
        return run_pass(parts, parts.scheduler.schedule())[0]

    def forget(self, request_id: str) -> None:
        """Forget nothing."""

    def num_in_flight(self, request_id: str) -> int:  # noqa: ARG002 - the same for all
        """Return 0: between steps, nothing is."""
        return 0


def run_pass(parts: StepParts, works: Sequence[Work]) -> tuple[list[Emission], int]:
    """Advance requests by one pass of the target; return what they got, and the pass's rows."""
    times, start_s = StepTimes(), perf_counter()
    orders = parts.planner.order(works)
    drafts = parts.planner.choose(works, propose(parts, works, orders, times))
    with parts.cache.speculate([work.sequence for work in works]) as cache:
        states = _row_states(parts, works, drafts)
        batch = parts.target.batch(
            cache, [_segment(w, d, s) for w, d, s in zip(works, drafts, states, strict=True)]
        )
        rows, scored = _lay_out(batch, works, drafts)
        hidden_layers = _hidden_layers(parts, works)
        before_s = perf_counter()
        output = parts.target.forward(batch, rows, hidden_layers=hidden_layers)
        output.wait()  # verification would, and the pass is to be timed
        times.pass_s = perf_counter() - before_s
        verdicts = verify(parts.verifier, scored, output)
        cache.commit([(w.sequence, _kept(w, v)) for w, v in zip(works, verdicts, strict=True)])
    # The cache has moved on, so requests do too before anything of the drafters' can fail.
    emissions = emit(scored, verdicts, output)
    if output.hidden:
        show_states(parts, scored, verdicts, output.hidden)
    tell_drafters(parts.drafters, orders, scored, verdicts, output)
    times.total_s = perf_counter() - start_s
    parts.planner.observe(works, drafts, verdicts, times)
    return emissions, batch.num_rows


def propose(
    parts: StepParts, works: Sequence[Work], orders: Sequence[Order], times: StepTimes
) -> list[Draft]:
    """Return a draft per work: the union of what the ordered drafters propose."""
    if not any(orders):
        return [Draft.empty(work.request.token_ids[-1]) for work in works]
    proposed: dict[int, list[Draft]] = {}
    for place, (label, drafter) in enumerate(parts.drafters.items()):
        indices = [index for index, order in enumerate(orders) if label in order]
        if not indices:
            continue
        start_s = perf_counter()
        contexts = [
            _context(parts, works[index], label, orders[index][label], place) for index in indices
        ]
        drafts = drafter.propose(contexts)
        if len(drafts) != len(indices):
            raise violation(label, f"{len(drafts)} drafts for {len(indices)} contexts")
        for index, context, draft in zip(indices, contexts, drafts, strict=True):
            check_draft(label, draft, context, parts.target.info.vocab_size)
            proposed.setdefault(index, []).append(draft.renamed(label.partition("#")[0], label))
        times.draft_s[label] = perf_counter() - start_s
    return [
        _combine(proposed.get(index, []), work.request.token_ids[-1], work)
        for index, work in enumerate(works)
    ]


def verify(
    verifier: Verifier, scored: Sequence[Scored], output: ForwardOutput
) -> list[Verdict | None]:
    """Return a verdict per work; None where the prompt goes on or the request has failed."""
    is_argmax = any(
        it.work.budget is not None and it.work.request.sampler.is_argmax for it in scored
    )
    # The step's one wait for the device; samplers that need more look at the rows one by one.
    largest_ids = argmax_ids(output.logits) if is_argmax else []
    verdicts: list[Verdict | None] = []
    for it in scored:
        verdict = None
        if it.work.budget is not None:
            rows = TargetRows(output.logits, largest_ids, it.span)
            request = it.work.request
            try:
                verdict = verifier.verify(it.draft, rows, request.sampler, request.token_ids)
            except RequestError as error:
                request.sampler.fail(error, len(request.token_ids))
        verdicts.append(verdict)
    return verdicts


def emit(
    scored: Sequence[Scored], verdicts: Sequence[Verdict | None], output: ForwardOutput
) -> list[Emission]:
    """Give every request its tokens, or the error that ends it alone."""
    emissions = []
    for it, verdict in zip(scored, verdicts, strict=True):
        request = it.work.request
        _note_prompt_logprobs(it.work, output.logits, it.span.start)
        if verdict is None:
            if request.sampler.failure is not None:
                emissions.append(request.fail(request.sampler.failure))
        else:
            logprobs: list[TokenLogprobs] = []
            if request.params.logprobs is not None:
                rows, params = output.logits[it.span], request.params
                logprobs = output_logprobs(
                    rows, verdict, request.sampler, params, request.token_ids
                )
            source = it.draft.source
            sources = [*[source[node] for node in verdict.path], ""]
            emissions.append(request.take(verdict.token_ids, sources, source[1:], logprobs))
    return emissions


def show_states(
    parts: StepParts,
    scored: Sequence[Scored],
    verdicts: Sequence[Verdict | None],
    hidden: Mapping[int, Tensor],  # layer to [R, D]
) -> None:
    """Let the drafters that ask for hidden states have those of the tokens that stand."""
    standing: dict[str, list[StandingStates]] = {}
    for it, verdict in zip(scored, verdicts, strict=True):
        work, first = it.work, it.root - (it.work.num_known - 1)
        rows = [first + index for index in _kept(work, verdict)]
        for label in work.drafters:
            if layers := parts.hidden_layers.get(label):
                states = {layer: take_rows(hidden[layer], rows) for layer in layers}
                standing.setdefault(label, []).append(
                    StandingStates(request_id=work.request_id, start=work.start, hidden=states)
                )
    for label, own in standing.items():
        parts.drafters[label].observe(own)


def tell_drafters(
    drafters: Mapping[str, Drafter],
    orders: Sequence[Order],
    scored: Sequence[Scored],
    verdicts: Sequence[Verdict | None],
    output: ForwardOutput,
) -> None:
    """Let the drafters that drafted for a request know what was kept."""
    outcomes: dict[str, list[Outcome]] = {}
    for order, it, verdict in zip(orders, scored, verdicts, strict=True):
        if verdict is not None and order:
            num_top = max(drafters[label].needs.top_logits for label in order)
            outcome = _outcome(it, verdict, output, num_top)
            for label in order:
                outcomes.setdefault(label, []).append(outcome)
    for label, own in outcomes.items():
        drafters[label].commit(own)


def _outcome(it: Scored, verdict: Verdict, output: ForwardOutput, num_top: int) -> Outcome:
    return Outcome(
        request_id=it.work.request.request_id,
        verdict=verdict,
        draft=it.draft,
        top_ids=top_ids(output.logits[it.span], num_top) if num_top else NO_TOP_IDS,
    )


def top_ids(logits: Tensor, num_top: int) -> NDArray[np.int64]:
    """Return the likeliest tokens of each row, best first, [N, num_top]; -1 for want of more."""
    found = np.full((len(logits), num_top), -1, np.int64)
    for row, token_ids in enumerate(best_tokens(logits, num_top)[0]):
        found[row, : len(token_ids)] = token_ids
    return found


def _hidden_layers(parts: StepParts, works: Sequence[Work]) -> list[int]:
    """Return the layers whose states the drafters of these requests ask for."""
    if not parts.hidden_layers:
        return []
    labels = {label for work in works for label in work.drafters}
    return sorted({layer for label in labels for layer in parts.hidden_layers.get(label, ())})


def _context(
    parts: StepParts, work: Work, label: str, budget: DraftBudget, place: int
) -> DraftContext:
    request = work.request
    is_greedy = request.sampler.is_greedy  # then every rule takes the likeliest, and any draft
    return DraftContext(
        request_id=request.request_id,
        token_ids=request.token_ids,
        sampler=request.sampler,
        budget=budget,
        siblings=SiblingDraw.DETERMINISTIC if is_greedy else parts.draws[label],
        drafter_index=place,
        past=CachedPast(parts.cache, work.sequence),
    )


def _combine(drafts: Sequence[Draft], root_id: int, work: Work) -> Draft:
    drafts = [draft for draft in drafts if draft.tree.num_draft_tokens]
    if not drafts or work.budget is None:
        return Draft.empty(root_id)
    merged = drafts[0] if len(drafts) == 1 else merge_drafts(drafts)
    return merged.prune(work.budget.max_nodes)


def check_draft(label: str, draft: Draft, context: DraftContext, vocab_size: int) -> None:
    """Check that a draft keeps the contract: its root, its bounds and its tokens.

    Raises:
        DrafterError: It does not.
    """
    tree, budget = draft.tree, context.budget
    num_nodes, problem = tree.num_draft_tokens, None
    if tree.token_ids[0] != context.token_ids[-1]:
        problem = (
            f"a draft whose root is {tree.token_ids[0]}; the pending token is "
            f"{context.token_ids[-1]}"
        )
    elif num_nodes > budget.max_nodes or (  # no path has more tokens than the tree
        num_nodes > budget.max_depth and max(tree.depths) > budget.max_depth
    ):
        problem = (
            f"a draft of {num_nodes} nodes and depth {max(tree.depths)}; "
            f"the bounds are {budget.max_nodes} and {budget.max_depth}"
        )
    elif budget.max_width is not None and max(map(len, tree.children)) > budget.max_width:
        problem = (
            f"a draft of width {max(map(len, tree.children))}; at most {budget.max_width} is taken"
        )
    elif min(tree.token_ids) < 0 or max(tree.token_ids) >= vocab_size:
        problem = f"a draft with token ids outside [0, {vocab_size}): {tree.token_ids}"
    if problem:
        raise violation(label, problem)


def violation(label: str, problem: str) -> DrafterError:
    """Return the error that says how a drafter has broken its contract."""
    return DrafterError(
        f"drafter {label!r} returned {problem}",
        hint="this is a bug in the drafter; leave it out until it is mended",
    )


# A work's rows are the tokens that stand, as a chain, then the draft below the last of them.
# The last known token is the root, so tree node n is row num_known - 1 + n of the segment.


def _segment(work: Work, draft: Draft, states: RowStates | None) -> Segment:
    num_known, root = work.num_known, work.num_known - 1
    known = work.request.token_ids[work.start : work.start + num_known]
    return Segment(
        work.sequence,
        [*known, *draft.tree.token_ids[1:]] if work.budget is not None else known,
        [*range(-1, root), *(parent + root for parent in draft.tree.parents[1:])],
        states,
    )


def _row_states(
    parts: StepParts, works: Sequence[Work], drafts: Sequence[Draft]
) -> list[RowStates | None]:
    """Return what the drafter that runs most of the target's layers knows of each work's rows."""
    label = parts.sharer
    if label is None:
        return [None] * len(works)
    return [
        parts.drafters[label].row_states(
            work.request.request_id, range(work.start, work.start + work.num_known), draft
        )
        if work.budget is not None and label in work.request.drafters
        else None
        for work, draft in zip(works, drafts, strict=True)
    ]


def _num_rows(work: Work, draft: Draft) -> tuple[int, int]:
    """Return how many rows' logits are wanted: before the root, and of the tree from it on.

    Those before the root are for the log-probabilities of the prompt.
    """
    scores_prompt = work.request.params.prompt_logprobs is not None
    is_wanted = work.budget is not None or scores_prompt
    return work.num_known - 1 if scores_prompt else 0, len(draft.tree) if is_wanted else 0


def _lay_out(
    batch: RaggedBatch, works: Sequence[Work], drafts: Sequence[Draft]
) -> tuple[list[int], list[Scored]]:
    """Return the rows whose logits are wanted, and where to find what of each work."""
    rows: list[int] = []
    scored = []
    for start, work, draft in zip(batch.starts[:-1], works, drafts, strict=True):
        root = start + work.num_known - 1
        num_before, num_nodes = _num_rows(work, draft)
        first = len(rows) + num_before
        rows += range(root - num_before, root + num_nodes)
        scored.append(Scored(work, draft, root, slice(first, first + num_nodes)))
    return rows, scored


def _note_prompt_logprobs(work: Work, logits: Tensor, root: int) -> None:
    """Add what this step's rows say about the tokens of the prompt that come after them."""
    request, num_top = work.request, work.request.params.prompt_logprobs
    if num_top is None:
        return
    first_row = root - (work.num_known - 1)
    last = min(work.start + work.num_known, request.num_prompt_ids - 1)
    first = max(work.start, len(request.prompt_logprobs)) + 1  # some are fed a second time
    for position in range(first, last + 1):
        row = logits[first_row + position - 1 - work.start]
        request.prompt_logprobs.append(row_logprobs(row, request.token_ids[position], num_top))


def _kept(work: Work, verdict: Verdict | None) -> list[int]:
    path = () if verdict is None else verdict.path
    return [*range(work.num_known), *[work.num_known - 1 + node for node in path]]
