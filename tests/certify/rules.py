"""Rules, drafters and targets that are wrong on purpose, and right ones to put beside them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from foretoken.certify.certificate import Certification
from foretoken.certify.settings import CertifyPrompt, CertifySettings
from foretoken.core.draft import Draft, Draws, SiblingDraw
from foretoken.core.noise import Stream
from foretoken.core.params import SamplingParams
from foretoken.core.tree import ROOT, TokenTree
from foretoken.core.verdict import Exactness
from foretoken.drafters.base import Drafter, DrafterNeeds
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.models.adapter import ForwardOutput
from foretoken.planner.plan import Plan
from foretoken.verifiers import VERIFIERS
from foretoken.verifiers.coupled import CoupledVerifier
from foretoken.verifiers.dice import GeneratorDice, ratio, residual
from foretoken.verifiers.mss import MultiStepVerifier
from foretoken.verifiers.naive import NaiveVerifier
from foretoken.verifiers.probabilistic import Decision, as_verdict
from foretoken.verifiers.rejection import RejectionVerifier
from foretoken.verifiers.walk import follow
from tests.engines import TableModel

VOCAB_SIZE = 16
PROMPTS = ((1, 2), (3,), (4, 5, 6), (7, 8))


# -- models and drafters -------------------------------------------------------------------------


class BitwiseTable(TableModel):
    """A table model that says what it is: each row depends on its own token alone."""

    def __init__(self, logits):
        super().__init__(logits)
        self.info = replace(self.info, exactness=Exactness.BITWISE)


class CrowdedTable(BitwiseTable):
    """Claims bitwise, but logits move with the number of rows in the pass."""

    SHIFT = 1e-9

    def forward(self, batch, rows, *, hidden_layers=()):
        output = super().forward(batch, rows)
        pattern = torch.linspace(-1, 1, VOCAB_SIZE, dtype=torch.float64)
        return ForwardOutput(
            logits=output.logits + self.SHIFT * batch.num_rows * pattern, hidden={}
        )


class RoundingTable(CrowdedTable):
    """Claims only numerical, and moves no further than its own prompt passes do."""

    def __init__(self, logits):
        super().__init__(logits)
        self.info = replace(self.info, exactness=Exactness.NUMERICAL)


class MaskedWrongly(RoundingTable):
    """Claims numerical, but a draft's rows are those of another token: a wrong tree mask."""

    def forward(self, batch, rows, *, hidden_layers=()):
        output = super().forward(batch, rows)
        parents = batch.layout.parents
        is_tree = len(parents) > 1 and (np.diff(parents) == 0).any()
        return ForwardOutput(logits=output.logits + 0.01 * bool(is_tree), hidden={})


def tables(spread=1.5, distance=1.0):
    """Return logits of a target and of a drafter that knows it more or less."""
    generator = torch.Generator().manual_seed(5)
    shape = (VOCAB_SIZE, VOCAB_SIZE)
    target = spread * torch.randn(shape, generator=generator, dtype=torch.float64)
    return target, target + distance * torch.randn(shape, generator=generator, dtype=torch.float64)


class TableDrafter(Drafter):
    """Draws trees of fixed shape from a table, in the way that the rule asks for.

    Args:
        logits: [V, V].
        widths: Draws per node, level by level.
    """

    draws = frozenset(SiblingDraw) - {SiblingDraw.COUPLED}
    stream = Stream.DRAFT

    def __init__(self, logits, widths):
        self.needs = DrafterNeeds()
        self._table = logits
        self._widths = widths

    def propose(self, contexts):
        return [self._tree(context) for context in contexts]

    def _tree(self, context):
        generator = context.sampler.generator(self.stream, len(context.token_ids))
        token_ids, parents, draws = [context.token_ids[-1]], [-1], {}
        level = [ROOT]
        for width in self._widths[: context.budget.max_depth]:
            next_level = []
            for node in level:
                path = TokenTree(tuple(token_ids), tuple(parents)).sequence(node)[1:]
                row = self._table[token_ids[node]]
                probs = context.sampler.distribution(row, context.token_ids, path)
                nodes = []
                for token_id in self._draw(probs, width, context.siblings, generator):
                    known = [child for child in nodes if token_ids[child] == token_id]
                    nodes.append(known[0] if known else len(token_ids))
                    if not known:
                        token_ids.append(token_id)
                        parents.append(node)
                draws[node] = (Draws(nodes=tuple(nodes), probs=probs),)
                next_level += dict.fromkeys(nodes)
            level = next_level
        tree = TokenTree(tuple(token_ids), tuple(parents))
        is_drawn = context.siblings is not SiblingDraw.DETERMINISTIC
        return Draft.from_drafter(
            "table", tree, siblings=context.siblings, draws=draws if is_drawn else None
        )

    def _draw(self, probs, width, siblings, generator):
        if siblings is SiblingDraw.DETERMINISTIC:
            return [int(token_id) for token_id in np.argsort(-probs, kind="stable")[:width]]
        drawn = []
        for _ in range(width):
            cumulative = np.cumsum(probs)
            drawn.append(int(np.searchsorted(cumulative, generator.random() * cumulative[-1])))
            if siblings is SiblingDraw.WITHOUT_REPLACEMENT:
                probs = np.where(np.arange(len(probs)) == drawn[-1], 0.0, probs)
        return drawn


class PretendingDrafter(TableDrafter):
    """Takes the likeliest tokens and says that they are samples."""

    def _draw(self, probs, width, siblings, generator):
        return super()._draw(probs, width, SiblingDraw.DETERMINISTIC, generator)


class EavesdroppingDrafter(TableDrafter):
    """Draws with the random numbers that the rule is going to use."""

    stream = Stream.VERIFY


# -- rules ---------------------------------------------------------------------------------------


class _Chain(RejectionVerifier):
    """Rejection sampling on chains, in parts that can be replaced by wrong ones."""

    name = "broken"
    draws = (SiblingDraw.IID,)

    def decide(self, draft, target_probs, dice):
        node = ROOT
        while draft.tree.children[node]:
            [group] = draft.draws[node]
            [child] = group.nodes
            token_id = draft.tree.token_ids[child]
            target, drafted = target_probs(node), self.draft_probs(group.probs)
            if not dice.accept(self.acceptance(target[token_id], drafted[token_id])):
                return Decision(node, dice.draw(self.rest(target, drafted)))
            node = child
        return Decision(node, self.bonus(target_probs, draft.tree, node, dice))

    def draft_probs(self, probs):
        return probs

    def acceptance(self, target_prob, draft_prob):
        return ratio(target_prob, draft_prob)

    def rest(self, target, drafted):
        return residual(target, drafted)

    def bonus(self, target_probs, tree, node, dice):
        return dice.draw(target_probs(node))


class AcceptsTooMuch(_Chain):
    """Accepts with probability min(1, 1.1 p / q)."""

    def acceptance(self, target_prob, draft_prob):
        return ratio(1.1 * target_prob, draft_prob)


class AcceptsAlways(_Chain):
    def acceptance(self, target_prob, draft_prob):
        return 1.0


class ForgetsResidual(_Chain):
    """Samples from p, not from (p - q)+, after a rejection."""

    def rest(self, target, drafted):
        return target


class ForgetsTemperature(_Chain):
    """Compares with q before the temperature, although the draft was drawn after it."""

    def draft_probs(self, probs):
        cold = probs**TEMPERATURE
        return cold / cold.sum()


class LikeliestBonus(_Chain):
    """The bonus token is the likeliest one."""

    def bonus(self, target_probs, tree, node, dice):
        return int(target_probs(node).argmax())


class EarlyBonus(_Chain):
    """The bonus token is sampled from the row above the last one."""

    def bonus(self, target_probs, tree, node, dice):
        return dice.draw(target_probs(max(ROOT, tree.parents[node])))


class StalePenalty(NaiveVerifier):
    """Penalties see the history of the step's start at every node."""

    name = "broken"

    def verify(self, draft, rows, sampler, token_ids):
        dice = GeneratorDice(sampler.generator(Stream.VERIFY, len(token_ids)))

        def choose(node, path):
            return dice.draw(sampler.distribution(rows.logits[node], token_ids, ()))

        return follow(draft.tree, choose)


class StaleCoupledPenalty(CoupledVerifier):
    """The same with the target's race; claims bitwise."""

    def verify(self, draft, rows, sampler, token_ids):
        def choose(node, path):
            noise = sampler.noise(len(token_ids) + len(path), rows.logits[node])
            scores = sampler.scores(rows.logits[node].unsqueeze(0), token_ids, [()])[0]
            return int((scores if sampler.is_greedy else scores + noise).argmax())

        return follow(draft.tree, choose)


class TakesNearMisses(CoupledVerifier):
    """Claims bitwise, but takes a drafted child that comes close enough."""

    def verify(self, draft, rows, sampler, token_ids):
        def choose(node, path):
            scores = sampler.race_scores(rows.logits[node].unsqueeze(0), token_ids, [path])[0]
            best = int(scores.argmax())
            for child in draft.tree.children[node]:
                token_id = draft.tree.token_ids[child]
                if scores[token_id] > scores[best] - 0.3:
                    return token_id
            return best

        return follow(draft.tree, choose)


class SameDiceEachStep(NaiveVerifier):
    """Every step of a request rolls the same dice."""

    name = "broken"

    def verify(self, draft, rows, sampler, token_ids):
        dice = GeneratorDice(sampler.generator(Stream.VERIFY))

        def target_probs(node):
            path = draft.tree.sequence(node)[1:]
            return sampler.distribution(rows.logits[node], token_ids, path)

        return as_verdict(draft.tree, self.decide(draft, target_probs, dice))


class SameDiceEachRequest(NaiveVerifier):
    """The seed plays no part."""

    name = "broken"

    def verify(self, draft, rows, sampler, token_ids):
        dice = GeneratorDice(np.random.default_rng(len(token_ids)))

        def target_probs(node):
            path = draft.tree.sequence(node)[1:]
            return sampler.distribution(rows.logits[node], token_ids, path)

        return as_verdict(draft.tree, self.decide(draft, target_probs, dice))


class KeepsDraftProbs(MultiStepVerifier):
    """Takes draws without replacement, and does not take them out of q."""

    name = "broken"
    draws = (SiblingDraw.WITHOUT_REPLACEMENT,)

    @staticmethod
    def _test_draws(draft, node, target_probs, dice):
        rest = target_probs
        for group in draft.draws.get(node, ()):
            for child in group.nodes:
                token_id = draft.tree.token_ids[child]
                if dice.accept(ratio(rest[token_id], group.probs[token_id])):
                    return child, rest
                rest = residual(rest, group.probs)
        return None, rest


BROKEN_RULES = {
    f"broken-{kind.__name__}": kind
    for kind in (
        AcceptsTooMuch,
        AcceptsAlways,
        ForgetsResidual,
        ForgetsTemperature,
        LikeliestBonus,
        EarlyBonus,
        StalePenalty,
        StaleCoupledPenalty,
        TakesNearMisses,
        SameDiceEachStep,
        SameDiceEachRequest,
        KeepsDraftProbs,
    )
}


@pytest.fixture(autouse=True)
def broken_rules(monkeypatch):
    """Register the broken rules for one test; elsewhere the registry holds right ones only."""
    for name, kind in BROKEN_RULES.items():
        monkeypatch.setitem(VERIFIERS._table, name, kind)


TEMPERATURE = 0.6


def certify(
    rule,
    *,
    widths=(1, 1, 1),
    target=BitwiseTable,
    drafter=TableDrafter,
    settings=None,
    **params,
):
    """Return the record of a certificate over table models, at the default sample sizes.

    Args:
        rule: Registered name.
        widths: Shape of the drafts.
        target: Class of the target.
        drafter: Class of the drafter.
        settings: Fields of `CertifySettings` that differ.
        params: Controls.
    """
    target_logits, draft_logits = tables()
    model = target(target_logits)
    engine = Engine(
        model,
        model.new_cache(2000),
        {"table": drafter(draft_logits, widths)},
        VERIFIERS.load(rule)(),
        Plan(verifier=rule, max_nodes=int(np.cumprod(widths).sum())),
        config=EngineConfig(max_requests=16),
    )
    prompts = tuple(
        CertifyPrompt(
            prompt_ids=ids,
            params=SamplingParams(max_new_tokens=24, **params),
            temperatures=(0.0, TEMPERATURE),
            place=f"prompt {number}",
        )
        for number, ids in enumerate(PROMPTS)
    )
    certification = Certification(engine, CertifySettings(prompts=prompts, **(settings or {})))
    certification.run()
    return certification.record()
