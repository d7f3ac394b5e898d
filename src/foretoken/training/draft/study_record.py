"""What a shape study is asked and what it gives."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, get_args

from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.training.draft.distil import DistilConfig
from foretoken.training.draft.initialise import Method
from foretoken.training.settings import check_counts, check_seed


@dataclass(frozen=True, slots=True, kw_only=True)
class StudySettings:
    """What is compared, and how closely.

    Args:
        depths: Layers of the full-width drafts, each of which begins a family of as many
            parameters; those that the target has not are left out.
        vocab_shares: Shares of the target's tokens that versions with fewer tokens have.
        shapes: To compare instead of all that, as `DraftShape.parse` reads them.
        lookahead: Longest chain of draft tokens that is considered.
        rounds: How often every candidate is timed.
        timed_steps: Steps of each round.
        num_trained: Candidates that are trained for their acceptance; the others lie between them.
        num_steps: Of each training.
        batch_size: Most texts per step.
        learning_rate: The highest.
        loss: A name of `training.losses.DIVERGENCES`.
        method: How drafts begin, "prune" or "scratch".
        temperature: Of the texts, and of serving.
        precision: Of training.
        num_held_out: Texts that are measured on and not trained on, a quarter of all at most.
        device: Where everything runs.
        seed: Of everything random.

    Raises:
        ConfigError: A value is not allowed.
    """

    depths: tuple[int, ...] = (1, 2, 4)
    vocab_shares: tuple[float, ...] = (0.5, 0.25)
    shapes: tuple[str, ...] = ()
    lookahead: int = 8
    rounds: int = 5
    timed_steps: int = 16
    num_trained: int = 5
    num_steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-3
    loss: str = "forward-kl"
    method: Method = "prune"
    temperature: float = 0.0
    precision: str = "auto"
    num_held_out: int = 16
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("lookahead", "rounds", "timed_steps", "num_trained", "num_held_out")
        check_counts(self, counts)
        check_seed(self.seed)
        if not self.depths or min(self.depths) < 1:
            raise ConfigError(
                f"depths are integers >= 1; got {self.depths}", hint="change --depths"
            )
        if not all(0 < share < 1 for share in self.vocab_shares):
            raise ConfigError(
                f"vocab_shares lie between 0 and 1; got {self.vocab_shares}",
                hint="change --vocab-shares",
            )
        if self.method not in get_args(Method):
            raise ConfigError(
                f"a draft begins by {' or '.join(get_args(Method))}; got {self.method!r}",
                hint="change --method",
            )
        self.distillation()

    def distillation(self) -> DistilConfig:
        """Return how candidates are trained."""
        return DistilConfig(
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            loss=self.loss,
            temperature=self.temperature,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Times of some rounds, in milliseconds.

    Args:
        low: The shortest.
        median: Half are shorter.
        high: The longest.
    """

    low: float
    median: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """What is known of a shape.

    Args:
        shape: As `DraftShape.parse` reads it.
        layers: Its depth.
        hidden: Its width.
        vocab: Its tokens.
        num_parameters: Of the whole draft model.
        draft_ms: A draft of the longest lookahead.
        overhead_ms: What else a step with a draft takes more than one without.
        acceptances: Conditional, by depth of the chain.
        cross_entropy: Of held-out output tokens after the short training, in nats; None if it was
            not trained.
        num_draft_tokens: Best lookahead; 0 if no draft pays.
        tokens_per_step: TAR there.
        speed_up: Over plain decoding, there.
        slowest: The same with the longest draft time of all rounds.
        fastest: The same with the shortest.
    """

    shape: str
    layers: int
    hidden: int
    vocab: int
    num_parameters: int
    draft_ms: Spread
    overhead_ms: float
    acceptances: list[float]
    cross_entropy: float | None
    num_draft_tokens: int
    tokens_per_step: float
    speed_up: float
    slowest: float
    fastest: float

    @property
    def is_trained(self) -> bool:
        """Whether its acceptance was measured; else it is interpolated."""
        return self.cross_entropy is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyReport:
    """A finished study.

    Args:
        target: The target's name.
        target_parameters: Its size.
        lookahead: Longest chain that was considered.
        plain_ms: A step of plain decoding.
        verify_ms: A step with 0, 1, ... draft tokens, without drafting, [lookahead + 1].
        candidates: Family by family.
        fit: Of the acceptance model: coefficients, profile, residual.
        findings: What the paper says, checked here.
        settings: As asked for.
    """

    target: str
    target_parameters: int
    lookahead: int
    plain_ms: float
    verify_ms: list[float]
    candidates: list[Candidate]
    fit: dict[str, Any]
    findings: dict[str, Any]
    settings: dict[str, Any]

    @property
    def best(self) -> Candidate:
        """The candidate of the greatest predicted speed-up; among equals, of fewest parameters."""
        return max(self.candidates, key=lambda it: (it.speed_up, -it.num_parameters))

    @property
    def chosen(self) -> DraftShape:
        """Its shape."""
        return DraftShape.parse(self.best.shape)

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {"what": "shape study", "chosen": self.best.shape, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> StudyReport:
        """Return the report that `as_dict` described."""
        rest = {key: it for key, it in values.items() if key not in ("what", "chosen")}
        rest["candidates"] = [
            Candidate(**{**it, "draft_ms": Spread(**it["draft_ms"])}) for it in rest["candidates"]
        ]
        return cls(**rest)


__all__ = ["Candidate", "Spread", "StudyReport", "StudySettings"]
