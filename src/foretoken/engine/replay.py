"""Replay: a drafter scored against recorded outputs, without decoding them again.

Output does not depend on drafts, so a recorded output tells what the target says of any draft:
the nodes along the record are taken, the others are not. The engine runs as ever, around a
target that computes nothing of drafts and a verifier that reads the record; only the target's pass
is missing from the times. For drafters that draft from the target's states or its cache, the
target reads every recording once.

Source: the replay of "Decoding Speculative Decoding", arXiv:2402.01528, section 4, there for
greedy chains. Here also sampled: noise is keyed by seed and position, so drafters that run the
target's race draft what they drafted live.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from foretoken.core.draft import Draft
from foretoken.core.params import SamplingParams
from foretoken.core.sampling import Sampler
from foretoken.core.verdict import FinalKind, Verdict
from foretoken.drafters.base import Drafter, DrafterNeeds
from foretoken.engine.engine import CompileGrammar, Engine, EngineConfig
from foretoken.engine.replay_target import Attendance, Reader, RecordedTarget
from foretoken.engine.request import Request
from foretoken.engine.stats import RequestStats
from foretoken.engine.step_log import DraftRecord, StepLog, StepRecord
from foretoken.engine.text import Decode
from foretoken.errors import ConfigError
from foretoken.models.adapter import LanguageModel, ModelInfo
from foretoken.models.cache import BLOCK_SIZE
from foretoken.planner.base import Planner
from foretoken.planner.plan import Plan
from foretoken.verifiers.base import TargetRows
from foretoken.verifiers.coupled import CoupledVerifier


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What a target said once.

    Args:
        prompt_ids: At least one token.
        output_ids: At least one token; all of the output, its end-of-sequence token included.
        params: As it was asked for.
        seed: Of its noise, as the response reported it.
        reference_ids: As given with the request.
    """

    prompt_ids: Sequence[int]
    output_ids: Sequence[int]
    params: SamplingParams
    seed: int
    reference_ids: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What drafters did for recordings.

    Args:
        steps: In order.
        stats: One per recording.
    """

    steps: list[StepRecord]
    stats: list[RequestStats]

    @property
    def drafts(self) -> list[DraftRecord]:
        """Every draft of every request, empty ones included."""
        return [draft for step in self.steps for draft in step.drafts]

    @property
    def num_steps(self) -> int:
        """Steps of each request, summed: passes that plain decoding would compare with."""
        return sum(stats.num_steps for stats in self.stats)

    @property
    def tokens_per_step(self) -> float:
        """TAR over all: tokens per step of a request, the target's own included."""
        return sum(stats.num_tokens for stats in self.stats) / self.num_steps

    @property
    def mean_tokens_per_step(self) -> float:
        """TAR of each recording, averaged, so that long outputs count no more than short ones."""
        return sum(stats.tokens_per_step for stats in self.stats) / len(self.stats)


def replay(  # noqa: PLR0913 - one parameter is one part
    info: ModelInfo,
    drafters: Mapping[str, Drafter],
    recordings: Sequence[Recording],
    *,
    max_nodes: int,
    target: LanguageModel | None = None,
    planner: Planner | None = None,
    decode: Decode | None = None,
    compile_grammar: CompileGrammar | None = None,
    config: EngineConfig | None = None,
) -> Replay:
    """Return what drafters would have done for recorded outputs.

    Steps and tokens are exactly those of a live run with coupled verification, on a target whose
    exactness is bitwise. Two ends are cut: a record's last token always counts as the target's
    own, and the times of the target's passes are not those of decoding.

    Args:
        info: Of the target that was recorded.
        drafters: Label to drafter, fresh ones: what a drafter has learnt from these outputs
            before would flatter it. They are not closed.
        recordings: At least one.
        max_nodes: Most draft tokens per request and step.
        target: The one that was recorded, to read the recordings for drafters that ask for its
            states or its cache; others leave it alone.
        planner: Who drafts how much in each step; None for everybody, always, all of it.
        decode: Token ids to text, for requests with stop texts.
        compile_grammar: Makes the state of a request's grammar, for requests with one.
        config: How many run at once, one after the other by default.

    Raises:
        ConfigError: A drafter needs what neither a record nor the target's reading of it holds,
            or a record is none that its parameters could have made.
        RequestError: A recording's prompt or parameters do not fit the target.
    """
    _check(drafters, recordings, target)
    config = config or EngineConfig(max_requests=1)
    stand_in = RecordedTarget(info, _reader(drafters, target))
    longest = max(len(it.prompt_ids) + it.params.max_new_tokens for it in recordings)
    num_tokens = min(longest, info.context_limit) + max_nodes + 1 + BLOCK_SIZE
    verifier, log = _RecordVerifier(), StepLog(planner)
    engine = Engine(
        stand_in,
        stand_in.new_cache(config.max_requests * num_tokens),
        drafters,
        verifier,
        Plan(max_nodes=max_nodes),
        planner=Attendance(log, stand_in),
        decode=decode,
        compile_grammar=compile_grammar,
        config=config,
    )
    pairs = []
    try:
        for recording in recordings:
            request = engine.new_request(
                recording.prompt_ids,
                replace(recording.params, seed=recording.seed),
                reference_ids=recording.reference_ids,
            )
            verifier.recordings[request.sampler] = recording
            stand_in.texts[request.request_id] = [*recording.prompt_ids, *recording.output_ids]
            engine.submit(request)
            pairs.append((request, recording))
        _run(engine, pairs)
    finally:
        for request, _ in pairs:
            engine.abort(request.request_id)  # drafters forget what an error has left
    return Replay(steps=log.steps, stats=[request.stats for request, _ in pairs])


def is_replayable(needs: DrafterNeeds, *, has_target: bool = False) -> bool:
    """Return whether a replay tells what a drafter with such needs would draft.

    What the target thinks of nodes that were not taken, or before it is done, only decoding tells.

    Args:
        needs: The drafter's.
        has_target: Whether the target is there to read the recordings.
    """
    if needs.top_logits or needs.in_flight:
        return False
    return has_target or not _needs_reading(needs)


def _needs_reading(needs: DrafterNeeds) -> bool:
    return bool(needs.hidden_layers or needs.target_past or needs.shared_layers)


def _reader(drafters: Mapping[str, Drafter], target: LanguageModel | None) -> Reader | None:
    needs = [drafter.needs for drafter in drafters.values()]
    if target is None or not any(_needs_reading(it) for it in needs):
        return None
    layers = sorted({layer for it in needs for layer in it.hidden_layers})
    return Reader(target, tuple(layers), any(it.target_past for it in needs))


def _run(engine: Engine, pairs: Iterable[tuple[Request, Recording]]) -> None:
    """Step to the end of every record."""
    unfinished = list(pairs)
    while unfinished:
        engine.step()
        for request, recording in unfinished:
            num_left = len(recording.output_ids) - len(request.output_ids)
            if request.finish_reason is None and num_left == 0:
                engine.abort(request.request_id)  # the record was cut short
            elif request.finish_reason is not None and num_left:
                raise ConfigError(
                    f"a recording has {len(recording.output_ids)} output tokens, but with its "
                    f"parameters the output ends after {len(request.output_ids)} "
                    f"({request.finish_reason.value})",
                    hint="record the parameters that the output was made with",
                )
        unfinished = [pair for pair in unfinished if pair[0].finish_reason is None]


def _check(
    drafters: Mapping[str, Drafter],
    recordings: Sequence[Recording],
    target: LanguageModel | None,
) -> None:
    for label, drafter in drafters.items():
        if not is_replayable(drafter.needs, has_target=target is not None):
            is_readable = is_replayable(drafter.needs, has_target=True)
            raise ConfigError(
                f"drafter {label!r} drafts from what the target computes ({drafter.needs}), which "
                "a record of outputs does not hold",
                hint="give the target that was recorded"
                if is_readable
                else "measure it live, or replay other drafters",
            )
    if not recordings or not all(it.output_ids for it in recordings):
        raise ConfigError(
            f"a replay needs recordings with at least one output token each; got "
            f"{[len(it.output_ids) for it in recordings]}",
            hint="leave out prompts without output",
        )


class _RecordVerifier(CoupledVerifier):
    """Gives the verdict that the record implies."""

    def __init__(self) -> None:
        self.recordings: dict[Sampler, Recording] = {}  # samplers are one per request

    def verify(
        self,
        draft: Draft,
        rows: TargetRows,  # noqa: ARG002 - there was no pass
        sampler: Sampler,
        token_ids: Sequence[int],
    ) -> Verdict:
        """Walk down from the root as far as the record goes, but for its last token."""
        recording = self.recordings[sampler]
        rest = recording.output_ids[len(token_ids) - len(recording.prompt_ids) :]
        path = draft.tree.match(rest[:-1])
        is_leaf = not draft.tree.children[path[-1] if path else 0]
        kind = FinalKind.BONUS if is_leaf else FinalKind.RECOVERED
        return Verdict(tuple(path), tuple(rest[: len(path) + 1]), kind)


__all__ = ["Recording", "Replay", "is_replayable", "replay"]
