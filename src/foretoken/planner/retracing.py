"""What drafters that need nothing but tokens would have given: asked of texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from foretoken.errors import DrafterError
from foretoken.planner.base import Retrace, Share, Text
from foretoken.planner.experience import Experience
from foretoken.planner.probing import Probes

RETRACING_PART = 0.35  # of what may be spent on trials, at most
_MOST_CREDIT_S = 0.02
_LEAST_S = 1e-6  # that asking takes
_MOST_TOKENS = 256  # of a text, the newest, are enough to tell ...
_LEAST_TOKENS = 16  # ... and fewer tell too little
_LEAST_NEWS = 1e-3  # tokens that a draft is worth more or less; fewer change nothing for others
_MOST_PATIENCE = 16  # texts, until others than the cheapest are asked, where nobody copies
_TOLD = 16  # texts in a row in which nothing is copied; one more tells nothing new ...
_SKIPPED = 3  # ... and so many are not asked between two that are
_NEW_TOKENS = 64  # of a request that goes on, after which it is worth asking again
_SHARE_OF_FIRST = 0.5  # of what may be spent, for the cheapest drafter at once
_RATE_OF_DIFFERENCE = 0.02  # weight of the newest draft in how two drafters differ
_LEAST_WHOLE = 1e-3  # of which there is a part
_PRIOR_DRAFTS = 4.0  # drafts in which they do not, before anything is known
_EXAMPLE = tuple(range(64))


class _Difference:
    """How the nodes of a drafter compare with those of another, on the same texts.

    A drafter that also copies from elsewhere gives more on texts that do not repeat themselves,
    and the same on those that do: there is nothing left to be given. So it is a part of what the
    other one misses that it copies more, or of what the other one copies that it copies less.
    """

    def __init__(self, max_nodes: int) -> None:
        self._own, self._other = np.zeros(max_nodes), np.zeros(max_nodes)  # taken, of each node
        self._num_drafts = _PRIOR_DRAFTS

    def learn(self, counts: NDArray[np.int64], others: NDArray[np.int64]) -> None:
        """Learn from a text: how many drafts of each, and of how many each node was taken."""
        num_drafts = int(counts[0])
        self._num_drafts += num_drafts
        usual = 1.0 - (1.0 - _RATE_OF_DIFFERENCE) ** num_drafts
        rate = max(usual, num_drafts / self._num_drafts)
        self._own += rate * (counts[1:] / num_drafts - self._own)
        self._other += rate * (others[1:] / others[0] - self._other)

    @property
    def parts(self) -> NDArray[np.float64]:
        """Of what the other one misses, the part that it copies, of each node, [N].

        If negative, of what that one copies, the part that it misses.
        """
        more = self._own - self._other
        whole = np.where(more > 0.0, 1.0 - self._other, self._other)
        parts: NDArray[np.float64] = more / np.maximum(whole, _LEAST_WHOLE)
        return parts


class Retracing:
    """Has drafters retrace texts, as far as a share of the time allows.

    Output does not depend on drafts, so a text tells what drafts that were never made would have
    given. That costs a fraction of what a trial does. The cheapest drafter is asked of every
    text, or of one in four where nothing is copied, the others of as much of one as there is time
    for: what is learned of them is how they
    differ from the first on the same tokens. So drafters that copy the same are not compared by
    whose texts were the lucky ones.

    Args:
        retraces: By drafter; those that cannot tell are not in it.
        max_nodes: Most draft tokens per request and step.
        experience: It learns from them.
        probes: They know how much time has passed, and have that much less to spend.
        clock: Seconds.

    Attributes:
        base: The cheapest drafter, which is asked before the others; "" if there is none.
    """

    def __init__(
        self,
        retraces: Mapping[str, Retrace],
        max_nodes: int,
        experience: Experience,
        probes: Probes,
        clock: Callable[[], float],
    ) -> None:
        self._retraces, self._max_nodes = dict(retraces), max_nodes
        self._experience, self._probes, self._clock = experience, probes, clock
        self._credit_s = self._last_s = 0.0  # what may be spent, and when that was reckoned
        self._num_seen: dict[str, int] = {}  # tokens of a request
        self._token_s: dict[str, float] = {}  # of each drafter, what a token takes
        self._lap_s = self._clock() if self._retraces else 0.0
        for label in (*self._retraces, *self._retraces):  # first they are compiled
            self._ask(label, _EXAMPLE, len(_EXAMPLE))
        self.base, *others = sorted(self._retraces, key=self._token_s.__getitem__) or [""]
        self._differences = {label: _Difference(max_nodes) for label in others}
        self._turns = others
        self._num_waited, self._patience = 0, 1  # texts since one of them was asked, and until then
        # Texts in a row of which the cheapest would have copied nothing, and since it was asked.
        self._num_in_vain = self._num_skipped = 0

    def learn_all(self, shares: Sequence[Share]) -> None:
        """Learn from requests that go on, where enough is new."""
        if self._retraces:
            for share in shares:
                self.learn(share.text, _NEW_TOKENS)

    def learn(self, text: Text, least: int = _LEAST_TOKENS) -> float:
        """Learn what drafters would have given along a text, or the end of it.

        Args:
            text: Of a request.
            least: Tokens that have to be new since it was last asked of.

        Returns:
            How many tokens more a draft is worth to others than it was thought to be.
        """
        num_ids = len(text.token_ids)
        num_new = num_ids - self._num_seen.get(text.request_id, text.num_prompt_ids) - 1
        if not self._retraces or num_new < least or not self._has_credit() or self._skips():
            return 0.0
        start_s = self._lap_s = self._clock()
        self._num_seen[text.request_id] = num_ids
        news = self._learn(text, min(_MOST_TOKENS, num_new))
        seconds = self._clock() - start_s
        self._credit_s -= seconds
        self._probes.pay(seconds)  # who can tell needs no trials
        return news

    def _skips(self) -> bool:
        """Return whether a text is not asked of, since nothing has been copied for long."""
        is_skipped = self._num_in_vain > _TOLD and self._num_skipped < _SKIPPED
        self._num_skipped = self._num_skipped + 1 if is_skipped else 0
        self._num_waited += is_skipped
        return is_skipped

    def _has_credit(self) -> bool:
        """Return whether there is time to ask anybody."""
        earned_s = self._probes.earned_s
        self._credit_s += RETRACING_PART * (earned_s - self._last_s)
        self._credit_s, self._last_s = min(_MOST_CREDIT_S, self._credit_s), earned_s
        return self._credit_s > 0

    def _learn(self, text: Text, most: int) -> float:
        """Learn from as many of the last tokens of a text, if there is time; return as `learn`."""
        base, own = self.base, self._most(self.base, most, _SHARE_OF_FIRST)
        if own < _LEAST_TOKENS:
            return 0.0
        counts = self._ask(base, text.token_ids, own)
        self._num_in_vain = 0 if counts[1:].any() else self._num_in_vain + 1
        is_new = self._num_in_vain <= _TOLD
        news = self._experience.learn_text(text, base, counts) if is_new else 0.0
        is_told = bool(self._turns) and self._learn_next(text, own)
        if is_told or abs(news) > _LEAST_NEWS:
            for label, difference in self._differences.items():
                self._experience.learn_difference(text, label, base, difference.parts)
        return news

    def _learn_next(self, text: Text, most: int) -> bool:
        """Learn how the drafter whose turn it is differs from the cheapest, if there is time."""
        label = self._turns[0]
        most = self._most(label, most)
        self._num_waited += 1
        if most < _LEAST_TOKENS or self._num_waited < self._patience:
            return False
        self._turns = [*self._turns[1:], label]
        pair = [self._ask(it, text.token_ids, most) for it in (label, self.base)]
        self._differences[label].learn(*pair)
        # Where nobody copies anything there is no difference to be learned.
        is_copied = any(counts[1:].any() for counts in pair)
        self._patience = 1 if is_copied else min(_MOST_PATIENCE, 2 * self._patience)
        self._num_waited = 0
        return True

    def _most(self, label: str, most: int, share: float = 1.0) -> int:
        """Return how many tokens a drafter may be asked of for a share of what may be spent."""
        return min(most, int(share * self._credit_s / self._token_s[label]))

    def _ask(self, label: str, token_ids: Sequence[int], most: int) -> NDArray[np.int64]:
        """Return what a drafter says of the last tokens of a text, and note its price."""
        start = max(1, len(token_ids) - most)
        counts = self._retraces[label](token_ids, start, self._max_nodes)
        if len(counts) != 1 + self._max_nodes or counts[0] < 1:
            raise DrafterError(
                f"drafter {label!r} retraced {len(token_ids) - start} tokens as "
                f"{counts.tolist()}: at least one draft, and of how many of them each of "
                f"{self._max_nodes} nodes was taken",
                hint="this is a bug in the drafter; leave it out until it is mended",
            )
        before_s, self._lap_s = self._lap_s, self._clock()
        self._token_s[label] = max(_LEAST_S, self._lap_s - before_s) / most
        return counts

    def forget(self, request_id: str) -> None:
        """Forget a request."""
        self._num_seen.pop(request_id, None)


__all__ = ["RETRACING_PART", "Retracing"]
