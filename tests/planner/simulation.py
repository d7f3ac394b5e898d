"""A simulated machine for planners: passes, drafters and requests, costs and luck known."""

import random
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from foretoken.core.draft import Draft, DraftBudget, merge_drafts
from foretoken.core.tree import TokenTree
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.planner.adaptive import AdaptivePlanner
from foretoken.planner.base import StepTimes
from foretoken.planner.cost import CostCurve, CostModel

RIGHT = 1  # other tokens are wrong
PLANNING_S = 50e-6  # what the planner's clock advances between being read twice

COLD_STEPS = 3  # of a drafter that had a rest
RETRACING_S = 20e-6  # likewise, if it is to retrace a text


@dataclass
class SimulatedShare:
    """A request that decodes; its temperature only names its class."""

    request_id: str
    drafters: tuple
    budget: DraftBudget | None
    temperature: float = 0.0
    num_rows: int = 1
    num_keys: int = 20
    num_prompt_ids: int = 0

    @property
    def text(self):
        return self

    @property
    def token_ids(self):
        return SimulatedText(self.request_id, self.num_keys)


@dataclass
class SimulatedText:
    """So many tokens of a request."""

    request_id: str
    num_tokens: int

    def __len__(self):
        return self.num_tokens


@dataclass
class SimulatedDrafter:
    """Drafts chains whose every token is right with the same probability.

    Args:
        acceptance: That probability, or a function of the request's id.
        level_ms: Time of a level, for all requests together.
        request_ms: Time of each request.
        claimed: The log-probability that it claims for each guess.
        max_depth: Of its chains.
        is_retracer: Whether it can tell what it would have given along a text.
        cold: How many times as long its requests take in its first steps after it had a rest.
    """

    acceptance: object
    level_ms: float = 0.0
    request_ms: float = 0.02
    claimed: float = -0.5
    max_depth: int = 8
    is_retracer: bool = False
    cold: float = 1.0
    num_proposed: int = 0
    num_in_a_row: int = 0  # steps in which it drafted

    def chance(self, request_id):
        return self.acceptance(request_id) if callable(self.acceptance) else self.acceptance

    def retrace(self, token_ids, start, max_nodes):
        counts = np.zeros(1 + max_nodes, np.int64)
        if not isinstance(token_ids, SimulatedText):  # it is only to be compiled
            return counts + 1
        chance = self.chance(token_ids.request_id)
        rng = random.Random(f"{token_ids.request_id} {start}")  # all have the luck of a text
        while start < len(token_ids):
            length = min(self.max_depth, max_nodes, len(token_ids) - start)
            taken = 0
            while taken < length and rng.random() < chance:
                taken += 1
            counts[0] += 1
            counts[1 : 1 + taken] += 1
            start += 1 + taken
        return counts

    def propose(self, name, request_id, budget, rng):
        length = min(self.max_depth, budget.max_nodes, budget.max_depth)
        chance = self.chance(request_id)
        # A chain stops where another level does not pay, as growers do; the first one is not
        # asked.
        reached, tokens = 1.0, []
        for _ in range(length):
            if self.level_ms and tokens and reached < budget.min_gain:
                break
            reached *= 2.718281828**self.claimed
            tokens.append(RIGHT if rng.random() < chance else sum(name.encode()))
        self.num_proposed += 1
        tree = TokenTree.chain([RIGHT, *tokens])
        logprobs = (0.0, *(self.claimed for _ in tokens))
        return Draft.from_drafter(name, tree, draft_logprobs=logprobs)


class PlanningClock:
    """Advances each time it is read; whoever reads it twice has taken so long."""

    def __init__(self):
        self.now_s = self.taken_s = 0.0
        self.next_s = PLANNING_S

    def __call__(self):
        self.now_s += self.next_s
        self.taken_s += self.next_s / 2
        self.next_s = PLANNING_S
        return self.now_s

    def take_s(self):
        """Return the seconds that were taken since this was last asked."""
        seconds, self.taken_s = self.taken_s, 0.0
        return seconds


@dataclass
class Machine:
    """Runs a planner, or one fixed way to draft, in simulated time, planning included.

    Args:
        curve: Milliseconds of a pass by its rows.
        drafters: By label.
        rest_ms: Of a step, besides pass and drafting.
        noise: Relative standard deviation of every time.
    """

    curve: CostCurve
    drafters: dict
    rest_ms: float = 0.3
    noise: float = 0.05
    seed: int = 0
    ms: float = 0.0
    num_tokens: int = 0
    num_steps: int = 0
    ms_of: dict = field(default_factory=dict)

    def __post_init__(self):
        self.rng = random.Random(self.seed)
        self.ms_of = dict.fromkeys(self.drafters, 0.0)
        self.clock = PlanningClock()

    def planner(self, *, max_nodes=16, curve=None):
        first_guess = dict.fromkeys(self.drafters, 0.4)
        cost = CostModel(curve or self.curve)
        return AdaptivePlanner(
            cost,
            list(self.drafters),
            max_nodes=max_nodes,
            first_guess=first_guess,
            retraces={
                label: partial(self._retrace, drafter)
                for label, drafter in self.drafters.items()
                if drafter.is_retracer
            },
            clock=self.clock,
        )

    def run(self, planner, *, num_requests=1, num_steps=1500, max_nodes=16):
        """Decode with a planner; return tokens per millisecond of simulated time."""
        self.ms, self.num_tokens, self.num_steps = 0.0, 0, num_steps
        self.ms_of = dict.fromkeys(self.drafters, 0.0)
        budget = DraftBudget(max_nodes=max_nodes, max_depth=max_nodes)
        shares = [
            SimulatedShare(f"r{index}", tuple(self.drafters), budget)
            for index in range(num_requests)
        ]
        for _ in range(num_steps):
            self._step(planner, shares)
        return self.num_tokens / self.ms

    def run_texts(self, planner, acceptance, *, num_requests=1, num_tokens=128, max_nodes=16):
        """Decode texts one after the other, several requests at a time.

        Args:
            planner: Decides.
            acceptance: For each text, by drafter, how often a guess is right.
            num_requests: That have each text, and begin together.
            num_tokens: Of each request.

        Returns:
            Tokens per millisecond of each text.
        """
        rates = []
        budget = DraftBudget(max_nodes=max_nodes, max_depth=max_nodes)
        self.ms_of = dict.fromkeys(self.drafters, 0.0)
        for text, chances in enumerate(acceptance):
            for label, chance in chances.items():
                self.drafters[label].acceptance = chance
            self.ms, self.num_tokens = 0.0, 0
            left = [
                SimulatedShare(f"{text}.{index}", tuple(self.drafters), budget, num_keys=0)
                for index in range(num_requests)
            ]
            while left:
                self._step(planner, list(left))
                for share in [share for share in left if share.num_keys >= num_tokens]:
                    left.remove(share)
                    planner.finish(share)
                    planner.forget(share.request_id)
                self.ms += 1000 * self.clock.take_s()
            rates.append(self.num_tokens / self.ms)
        return rates

    def run_fixed(self, labels, size, **how):
        """Decode with some drafters in every step, at one size."""
        return self.run(FixedSize(labels, size), **how)

    def _step(self, planner, shares):
        orders = planner.order(shares)
        times = StepTimes()
        proposed = [[] for _ in shares]
        for label, drafter in self.drafters.items():
            own = [
                (place, drafter.propose(label, share.request_id, order[label], self.rng))
                for place, (share, order) in enumerate(zip(shares, orders, strict=True))
                if label in order
            ]
            drafter.num_in_a_row = drafter.num_in_a_row + 1 if own else 0
            if own:
                levels = max(max(draft.tree.depths) for _, draft in own)
                request_ms = drafter.request_ms
                if drafter.num_in_a_row <= COLD_STEPS:
                    request_ms *= drafter.cold
                ms = self._noisy(request_ms * len(own) + drafter.level_ms * levels)
                times.draft_s[label] = ms / 1000
                self.ms_of[label] += ms
            for place, draft in own:
                proposed[place].append(draft)
        drafts = [merge_drafts(own) if own else Draft.empty(RIGHT) for own in proposed]
        scored = planner.choose(shares, drafts)
        num_rows = len(shares) + sum(draft.tree.num_draft_tokens for draft in scored)
        num_keys = sum(share.num_keys for share in shares)
        pass_ms = self._noisy(self.curve.pass_ms(num_rows, num_keys, len(shares)))
        times.pass_s = pass_ms / 1000
        verdicts = [self._verdict(draft) for draft in scored]
        times.total_s = (
            times.pass_s
            + sum(times.draft_s.values())
            + self._noisy(self.rest_ms) / 1000
            + self.clock.take_s()
        )
        self.ms += 1000 * times.total_s
        for share, verdict in zip(shares, verdicts, strict=True):
            self.num_tokens += len(verdict.token_ids)
            share.num_keys += len(verdict.token_ids)
        planner.observe(shares, scored, verdicts, times)
        self.ms += 1000 * self.clock.take_s()

    def _retrace(self, drafter, token_ids, start, max_nodes):
        self.clock.next_s = RETRACING_S
        return drafter.retrace(token_ids, start, max_nodes)

    def _verdict(self, draft):
        path = draft.tree.match([RIGHT] * draft.tree.num_draft_tokens)
        kind = FinalKind.BONUS if len(path) == draft.tree.num_draft_tokens else FinalKind.RECOVERED
        return Verdict(tuple(path), (RIGHT,) * (len(path) + 1), kind)

    def _noisy(self, ms):
        return ms * max(0.5, 1.0 + self.noise * self.rng.gauss(0.0, 1.0))


class FixedSize:
    """Drafts in every step with the same drafters, at the same size."""

    def __init__(self, labels, size):
        self.labels, self.size = labels, size

    def order(self, shares):
        budget = DraftBudget(max_nodes=self.size, max_depth=self.size)
        return [dict.fromkeys(self.labels, budget) if self.size else {} for _ in shares]

    def choose(self, shares, drafts):
        return drafts

    def observe(self, shares, scored, verdicts, times):
        pass

    def finish(self, text):
        pass

    def forget(self, request_id):
        pass
