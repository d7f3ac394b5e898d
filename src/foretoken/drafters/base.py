"""The drafter contract: everything the engine knows about a drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from foretoken.core.draft import Draft, DraftBudget, SiblingDraw
from foretoken.core.noise import Stream
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import Verdict
from foretoken.models.adapter import LanguageModel
from foretoken.models.batch import RowStates
from foretoken.models.partial import CachedPast
from foretoken.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterNeeds:
    """What a drafter asks of the engine, which reads this and never the class.

    Args:
        hidden_layers: Target layers whose states the drafter observes; 0 is the embedding, and
            those after the last layer are normalized.
        top_logits: How many of the likeliest tokens after each scored node it receives.
        draft_cache: Whether it keeps keys and values that must follow every commit.
        shared_layers: How many of the target's first layers it runs itself, as `row_states` tell.
        target_past: Whether it takes over keys and values that the target has cached, from the
            context's `past`.
        in_flight: Whether it drafts inside the target's pass, as `drafters.in_flight` says: the
            target then runs loop by loop, with several tokens of a request on their way.
    """

    hidden_layers: tuple[int, ...] = ()
    top_logits: int = 0
    draft_cache: bool = False
    shared_layers: int = 0
    target_past: bool = False
    in_flight: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Taxonomy:
    """A drafter's place in the survey's table ("Beyond the Speculative Game", arXiv:2404.14897).

    Args:
        source: Where drafts come from: "retrieval", "independent model", "target itself", ...
        is_trained: Whether it needs weights made for it.
        termination: What ends a draft: "static" or "adaptive".
        structure: "chain" or "tree".
        reference: The paper or work it follows.
    """

    source: str
    is_trained: bool
    termination: str
    structure: str
    reference: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """What a drafter learns of a request when it starts.

    Args:
        request_id: Identifies the request until `stop`.
        prompt_ids: The prompt; at least one token.
        reference_ids: A text that came with the request, from which the output may copy: a
            predicted output, the file to be edited. Empty if there is none.
        token_ids: Prompt and output so far, a live view, not to be changed, for those who learn
            from outputs that they did not draft for. Empty where nobody keeps one.
    """

    request_id: str
    prompt_ids: Sequence[int]
    reference_ids: Sequence[int] = ()
    token_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftContext:
    """What a drafter knows of a request in one step.

    Args:
        request_id: As given to `start`.
        token_ids: Prompt and output so far, a live view, not to be changed. The last one is the
            pending token: the root of the draft.
        sampler: Makes the target's choices; drafters that have a distribution rank their
            candidates by its race.
        budget: Bounds that the draft must respect.
        siblings: How siblings are to be drawn, one of the drafter's `draws`. An empty draft fits
            every way.
        drafter_index: Which of the request's drafters this is.
        past: Where the target keeps the keys and values of the tokens before those that it is
            fed in this step, for drafters that run layers of it; None if there is no such place.
    """

    request_id: str
    token_ids: Sequence[int]
    sampler: Sampler
    budget: DraftBudget
    siblings: SiblingDraw = SiblingDraw.DETERMINISTIC
    drafter_index: int = 0
    past: CachedPast | None = None

    def generator(self) -> np.random.Generator:
        """Return the randomness of this drafter's samples in this step.

        It is independent of the verifier's, of other drafters' and of other steps'.
        """
        return self.sampler.generator(Stream.DRAFT, len(self.token_ids), self.drafter_index)


NO_TOP_IDS: NDArray[np.int64] = np.empty((0, 0), np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request in one step.

    Args:
        request_id: As given to `start`.
        verdict: What was kept. The request has taken its tokens, up to where it ended.
        draft: What was scored, of all drafters; the verdict's path are its nodes.
        top_ids: Likeliest tokens after each node by the target's raw logits, best first, [N, k],
            -1 where there are fewer; no rows unless a drafter that drafted in this step asks.
    """

    request_id: str
    verdict: Verdict
    draft: Draft
    top_ids: NDArray[np.int64] = field(default_factory=lambda: NO_TOP_IDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class StandingStates:
    """What the target computed in one step of tokens of a request that stand.

    Args:
        request_id: As given to `start`.
        start: Position of the first of these tokens.
        hidden: For each layer asked for, the states of the tokens from there on, [n, D].
    """

    request_id: str
    start: int
    hidden: Mapping[int, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterHost:
    """What a drafter may use when it is built.

    Args:
        target: The model being served.
        tokenizer: Its tokenizer, None if it has none.
        device: Where drafters put their own models.
        dtype: As given by the user, for their own models.
        max_requests: Requests that can run at once.
        kv_cache_tokens: Positions that the target's cache can hold.
    """

    target: LanguageModel
    tokenizer: Tokenizer | None
    device: str
    dtype: str
    max_requests: int
    kv_cache_tokens: int


class Drafter(Protocol):
    """Proposes drafts; a lifecycle of start, (propose, commit)*, stop for each request.

    A step may go without its draft, and then without its commit: what a draft is made from are
    the context's tokens. Drafters derive from this class, so that those who keep nothing leave out
    what they do not need.

    Attributes:
        Options: Frozen dataclass of its options.
        taxonomy: Its place in the literature.
        draws: Ways in which it can draw siblings.
        needs: What it asks of the engine.
    """

    Options: ClassVar[type[Any]]
    taxonomy: ClassVar[Taxonomy]
    draws: ClassVar[frozenset[SiblingDraw]]
    needs: DrafterNeeds

    @classmethod
    def create(cls, options: Any, host: DrafterHost) -> Drafter:
        """Build from options; the one place that may load models."""
        ...

    def serves(self, params: SamplingParams, *, has_reference: bool) -> bool:
        """Return whether it could ever draft for a request.

        Args:
            params: What the request asks.
            has_reference: Whether a text to copy from comes with it.
        """
        return True

    def start(self, request: RequestView) -> None:
        """Learn of a new request."""
        return

    def propose(self, contexts: Sequence[DraftContext]) -> list[Draft]:
        """Return one draft per context, in the same order, within each budget.

        The root of each draft is the context's last token. A draft depends on its own context
        alone, whatever else is in the batch.
        """
        ...

    def observe(self, standing: Sequence[StandingStates]) -> None:
        """Learn the target's states at tokens that stand, if `needs.hidden_layers` asks for any.

        It comes after every step, prompts and steps without its draft included, and before
        `commit`. What was told by then of a request are all its tokens but the pending one, in
        order, except those whose keys and values were found in the prefix cache: the first start
        need not be 0.

        Args:
            standing: One for each request of the step that it may draft for.
        """
        return

    def commit(self, outcomes: Sequence[Outcome]) -> None:
        """Learn what was kept of a step that this drafter drafted for.

        Its own draft may have been cut, or be empty.

        Args:
            outcomes: One for each request that it drafted for.
        """
        return

    def row_states(self, request_id: str, positions: range, draft: Draft) -> RowStates | None:
        """Return what it has computed in this step of the rows that the target is about to run.

        Asked of drafters whose `needs.shared_layers` is not 0, after all have drafted.

        Args:
            request_id: As given to `start`.
            positions: Of the tokens that stand and are fed, the root last. They are the first rows
                of the target's segment; the nodes of the draft follow.
            draft: What is to be scored, of all drafters.
        """
        return None

    def stop(self, request_id: str) -> None:
        """Forget a request; unknown ones are ignored."""
        return

    def close(self) -> None:
        """Let go of what is held beyond requests; nothing comes after it."""
        return


@runtime_checkable
class Follower(Protocol):
    """A drafter that can also be asked what it would draft later: most that retrieve can."""

    def follow(self, context: DraftContext, path: Sequence[int]) -> Draft:
        """Return what `propose` would if the tokens of a path had come next.

        It learns nothing of the path, and may come before, after or without `propose`.

        Args:
            context: The request as it stands; its budget is for what comes after the path.
            path: Tokens after those of the context; the last one is the root of the draft. If
                empty, the root is the pending token.
        """
        ...


@runtime_checkable
class Retracer(Protocol):
    """A drafter that can be asked what its drafts along a text would have given, at little cost.

    So it is compared with others on the same texts without drafting for any of them.
    """

    def retrace(self, token_ids: Sequence[int], start: int, max_nodes: int) -> NDArray[np.int64]:
        """Return what came of the drafts that `propose` would have made along a text.

        Each draft begins where the tokens that the one before it gave end, and the token after
        them. Nothing is learned, and what was proposed meanwhile makes no difference.

        Args:
            token_ids: Prompt and output of a request, as far as they are known.
            start: How many of the tokens were known when the first draft was made; at least 1.
            max_nodes: N, most nodes of each draft.

        Returns:
            How many drafts, at least one, and of how many of them the first node was taken, the
            second and so on, in the order of what the drafter thinks of them, [1 + N].
        """
        ...
