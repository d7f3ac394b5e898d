"""Engines for tests: table models, scripted drafters, runs that check the books each step."""

import random
from collections import defaultdict
from functools import lru_cache

import numpy as np
import torch

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.params import SamplingParams
from foretoken.core.tree import TokenTree
from foretoken.drafters.base import Drafter, DrafterHost, DrafterNeeds, Outcome
from foretoken.drafters.composite import CompositeDrafter
from foretoken.drafters.draft_model import DraftModelDrafter, DraftModelOptions
from foretoken.engine.engine import Engine, EngineConfig
from foretoken.models.adapter import ForwardOutput, ModelInfo
from foretoken.models.batch import RaggedBatch, Segment
from foretoken.models.cache import BLOCK_SIZE, KVCache, LayerShape
from foretoken.models.modules import adapt_module
from foretoken.planner.plan import Plan
from foretoken.verifiers.coupled import CoupledVerifier
from tests.fakes import build_module, tiny_config

KV_TOKENS = 640


class TableModel:
    """A model whose next-token logits depend on the last token alone: rows of a table.

    Args:
        logits: [V, V]; row t scores what follows token t.
        context_limit: As a real model's.
        eos_ids: Token ids that end a sequence.
    """

    tree_grower = None

    def __init__(self, logits, *, context_limit=256, eos_ids=()):
        self.table = logits.double()
        self.info = ModelInfo(
            name="table",
            vocab_size=logits.shape[1],
            hidden_size=1,
            num_layers=1,
            context_limit=context_limit,
            eos_ids=frozenset(eos_ids),
            num_parameters=logits.numel(),
            dtype=torch.float64,
            device=torch.device("cpu"),
            kv_layers=(LayerShape(1, 1, 1),),
        )
        self.num_passes = 0
        self.rows_per_pass = []
        self.fail_next = False

    def new_cache(self, num_tokens):
        info = self.info
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        return KVCache(info.kv_layers, num_blocks, dtype=info.dtype, device=info.device)

    def batch(self, cache, segments):
        return RaggedBatch(cache, segments)

    def forward(self, batch, rows, *, hidden_layers=()):
        if self.fail_next:
            self.fail_next = False
            raise RuntimeError("the device fell off")
        self.num_passes += 1
        self.rows_per_pass.append(batch.num_rows)
        # Through numpy: torch.tensor of a list keeps a little memory, more with each new length.
        wanted = torch.from_numpy(np.fromiter(rows, dtype=np.int64))
        token_ids = batch.token_ids[wanted]
        return ForwardOutput(logits=self.table[token_ids], hidden={})


def counting_model(vocab_size=26, **options):
    """Return a table model that counts: after t it says t + 1, greedily and almost surely."""
    table = torch.zeros(vocab_size, vocab_size, dtype=torch.float64)
    for token_id in range(vocab_size):
        table[token_id, (token_id + 1) % vocab_size] = 50.0
    return TableModel(table, **options)


def random_table(vocab_size=20, seed=0, *, spread=2.0, **options):
    """Return a table model with random rows."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, vocab_size, generator=generator, dtype=torch.float64)
    return TableModel(logits * spread, **options)


class ScriptedDrafter(Drafter):
    """Drafts whatever a function of the context says, and remembers what it was told.

    Args:
        draft: Maps a context to a `Draft`, a `TokenTree` or a list of tokens after the root.
    """

    draws = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, draft, name="scripted"):
        self.needs = DrafterNeeds()
        self.name = name
        self._draft = draft
        self.started, self.stopped, self.verdicts = [], [], defaultdict(list)
        self.num_proposed = 0

    def start(self, request):
        self.started.append(request.request_id)

    def propose(self, contexts):
        self.num_proposed += len(contexts)
        return [self._as_draft(context, self._draft(context)) for context in contexts]

    def commit(self, outcomes):
        for outcome in outcomes:
            self.verdicts[outcome.request_id].append(outcome.verdict)

    def stop(self, request_id):
        self.stopped.append(request_id)

    def _as_draft(self, context, draft):
        if isinstance(draft, list):
            draft = TokenTree.chain([context.token_ids[-1], *draft])
        return Draft.from_drafter(self.name, draft) if isinstance(draft, TokenTree) else draft


def outcome_of(verdict, request_id="r", draft=None, **values):
    """Return what drafters are told of a verdict; the root is unknown if there is no draft."""
    return Outcome(request_id=request_id, verdict=verdict, draft=draft or Draft.empty(0), **values)


def counting_drafter(vocab_size=26):
    """Return a drafter that is always right about `counting_model`, to the end of its budget."""

    def count(context):
        length = min(context.budget.max_nodes, context.budget.max_depth)
        last = context.token_ids[-1]
        return [(last + step) % vocab_size for step in range(1, length + 1)]

    return ScriptedDrafter(count)


class OracleDrafter(ScriptedDrafter):
    """Random trees, adversarially near the truth: paths follow it, leave it, repeat siblings.

    Args:
        truths: Whole token lists, prompt and plain output, of the requests to come.
        vocab_size: Token ids are below it.
    """

    def __init__(self, truths, vocab_size):
        super().__init__(self._tree, name="oracle")
        self._truths = [list(truth) for truth in truths]
        self._vocab_size = vocab_size

    def _tree(self, context):
        # A function of the context alone, as the contract asks.
        rng = random.Random(str(list(context.token_ids)))
        rest = self._rest(list(context.token_ids))
        token_ids, parents, depths = [context.token_ids[-1]], [-1], [0]
        for _ in range(rng.randint(0, context.budget.max_nodes)):
            parent = rng.choice((len(parents) - 1, rng.randrange(len(parents))))
            depth = depths[parent]
            width = context.budget.max_width or len(parents)
            if depth >= context.budget.max_depth or parents.count(parent) >= width:
                continue
            is_true = depth < len(rest) and rng.random() < 0.7
            token_ids.append(rest[depth] if is_true else rng.randrange(self._vocab_size))
            parents.append(parent)
            depths.append(depth + 1)
        return TokenTree(tuple(token_ids), tuple(parents))

    def _rest(self, token_ids):
        for truth in self._truths:
            if truth[: len(token_ids)] == token_ids:
                return truth[len(token_ids) :]
        return []


def micro_config(family, **changes):
    """Return a family's configuration cut to two layers."""
    config = tiny_config(family)
    if getattr(config, "layer_types", None):
        changes = {"layer_types": config.layer_types[:2], **changes}
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_config(family, **{name: 2, **changes})


@lru_cache(maxsize=32)
def micro_model(family="llama", seed=0, *, eos_ids=(), blur=0.0, **changes):
    """Return a model of two layers; `blur` moves its weights, for drafts that half agree.

    Args:
        family: One of `tests.fakes.FAMILIES`.
        seed: Of its weights; the same for target and draft.
        eos_ids: Token ids that end a sequence.
        blur: Share of other noise in each weight.
        changes: Override fields of the configuration.
    """
    config = micro_config(family, eos_token_id=list(eos_ids) or None, **changes)
    module = build_module(config, seed)
    if blur:
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                parameter.add_(noise * parameter.std() * blur)
    return adapt_module(module, name=f"micro-{family}")


def make_host(target, *, max_requests=4, kv_cache_tokens=KV_TOKENS, tokenizer=None):
    """Return what drafters may use beside a target."""
    return DrafterHost(
        target=target,
        tokenizer=tokenizer,
        device="cpu",
        dtype="float64",
        max_requests=max_requests,
        kv_cache_tokens=kv_cache_tokens,
    )


def states_of(target, token_ids, layers):
    """Return a target's states at all tokens of a text, by layer, from one pass of its own."""
    cache = target.new_cache(len(token_ids) + BLOCK_SIZE)
    segment = Segment(cache.open(), list(token_ids), range(-1, len(token_ids) - 1))
    return target.forward(target.batch(cache, [segment]), [], hidden_layers=layers).hidden


def make_draft_model(target, draft, *, host=None, **options):
    """Return the draft-model drafter over a model that is built already."""
    host = host or make_host(target)
    return DraftModelDrafter(draft, DraftModelOptions(path="unused", **options), host)


def make_engine(
    target,
    drafters=None,
    *,
    max_nodes=8,
    kv_tokens=KV_TOKENS,
    decode=None,
    planner=None,
    **sizes,
):
    """Return an engine over a fresh cache."""
    return Engine(
        target,
        target.new_cache(kv_tokens),
        drafters or {},
        CoupledVerifier(),
        Plan(max_nodes=max_nodes),
        decode=decode,
        planner=planner,
        config=EngineConfig(**sizes),
    )


def check_books(engine):
    """Check that no block of the target's cache or of a draft's is lost or owned twice.

    Between steps, failed ones included, nothing is staged in the target's cache, but for what the
    engine knows to be in flight.
    """
    engine.cache.check_integrity()
    num_staged = sum(sequence.num_staged for sequence in engine.cache._sequences)
    assert num_staged == sum(map(engine.loop.num_in_flight, engine._requests))
    for drafter in engine.drafters.values():
        for cache in draft_caches(drafter):
            cache.check_integrity()


def check_idle(engine):
    """Check that an engine without requests holds nothing."""
    assert engine.num_unfinished == 0
    check_books(engine)
    assert engine.cache.num_free_blocks == engine.cache.num_blocks
    assert engine.cache.num_sequences == 0
    for drafter in engine.drafters.values():
        assert held_sizes(drafter) == {}
        for cache in draft_caches(drafter):
            assert cache.num_free_blocks == cache.num_blocks
            assert cache.num_sequences == 0


def draft_caches(drafter):
    """Return the caches of a drafter, or of all that it is made of."""
    if isinstance(drafter, CompositeDrafter):
        return [cache for _, member in drafter.members for cache in draft_caches(member)]
    return [drafter._cache] if drafter.needs.draft_cache else []


def held_sizes(drafter):
    """Return what a drafter holds per request: its non-empty dicts, by attribute name."""
    if isinstance(drafter, ScriptedDrafter):
        return {}
    if isinstance(drafter, CompositeDrafter):
        held = {label: held_sizes(member) for label, member in drafter.members}
        return {label: sizes for label, sizes in held.items() if sizes}
    return {
        name: len(value)
        for name, value in vars(drafter).items()
        if isinstance(value, dict) and value
    }


def finish(engine):
    """Step until nothing is left, checking the books; return emissions by request id."""
    emissions = defaultdict(list)
    while engine.num_unfinished:
        for emission in engine.step():
            emissions[emission.request_id].append(emission)
        check_books(engine)
    return emissions


def plain_ids(target, prompt_ids, params):
    """Return what plain decoding of one request alone gives: no drafters, the prompt at once."""
    engine = make_engine(target, max_nodes=0, max_requests=1, prefill_chunk=4096)
    request = engine.add_request(prompt_ids, params)
    while engine.num_unfinished:
        engine.step()
    return request.output_ids


def greedy(num_tokens, **values):
    """Return greedy parameters."""
    return SamplingParams(max_new_tokens=num_tokens, **values)


def sampled(num_tokens, seed=0, **values):
    """Return sampling parameters, at temperature 1 unless told."""
    values = {"temperature": 1.0, **values}
    return SamplingParams(max_new_tokens=num_tokens, seed=seed, **values)
