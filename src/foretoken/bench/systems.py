"""Systems under test: what they are asked, what they answer, and a peer as one of them.

Nothing here imports torch: the memory of a peer's process is to be that of the peer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from foretoken.bench.memory import memory, reset_peak_memory
from foretoken.bench.peers.base import Peer, PeerOutput, PeerSpec
from foretoken.bench.phases import Phases
from foretoken.errors import ForetokenError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One prompt to continue, exactly alike in every system.

    Args:
        prompt_ids: At least one.
        max_new_tokens: How many tokens are made; the end of a sequence is ignored.
        temperature: 0 is greedy.
        seed: Of its noise.
        script: What the target is made to say, at least `max_new_tokens` of it; empty for what it
            says by itself. Only Foretoken's own hosts can do this.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    seed: int
    script: tuple[int, ...] = ()


@dataclass(slots=True, kw_only=True)
class Turn:
    """A system's way through all tasks, once.

    Args:
        outputs: One per task. In a batch of several, all have the seconds of their batch.
        unit_s: Seconds of each batch; the sum is the time of the turn.
        cpu_s: Seconds of processor time of the turn; None if nobody counted.
        phases: Where they went, if the system can be looked into.
        memory: See `foretoken.bench.memory.memory`.
    """

    outputs: list[PeerOutput]
    unit_s: list[float]
    cpu_s: float | None = None
    phases: Phases | None = None
    memory: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostInfo:
    """What a loaded system says of itself.

    Args:
        version: Package and version.
        dtype: Of the weights.
        context_limit: Tokens of prompt and output together; None if it does not say.
        num_parameters: Of the target; None if it does not say.
        vocab_size: Token ids that it knows; None if it does not say.
        exactness: How closely speculation follows plain decoding; empty if it does not say.
        max_batch: Most tasks that it runs at once; None for any number.
    """

    version: str
    dtype: str
    context_limit: int | None = None
    num_parameters: int | None = None
    vocab_size: int | None = None
    exactness: str = ""
    max_batch: int | None = None


class Host(Protocol):
    """A loaded system that takes turns."""

    info: HostInfo

    def run(self, tasks: Sequence[Task], *, batch_size: int, speculative: bool) -> Turn:
        """Continue all tasks, `batch_size` at once."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class PausingHost(Host, Protocol):
    """A system that can be stopped in the middle of a batch while others have their turns."""

    def run_in_parts(
        self, tasks: Sequence[Task], *, num_parts: int, speculative: bool
    ) -> Iterator[Turn]:
        """Continue tasks, all at once, and yield a turn for every part of their tokens.

        Others may work between two parts: neither their time nor what they do counts. A part has
        no step if the one before has made its tokens, too.

        Args:
            tasks: One batch.
            num_parts: As many turns are yielded; all outputs come with the last.
            speculative: False for plain decoding.
        """
        ...


class PeerHost:
    """A peer behind the same interface, one task at a time.

    Args:
        peer_class: From the registry.
        spec: What to load.
    """

    def __init__(self, peer_class: type[Peer], spec: PeerSpec) -> None:
        self._peer = peer_class.load(spec)
        self.info = HostInfo(version=self._peer.version, dtype=spec.dtype, max_batch=1)

    def run(self, tasks: Sequence[Task], *, batch_size: int, speculative: bool) -> Turn:
        """Continue all tasks.

        Raises:
            ForetokenError: The peer made another number of tokens than it was asked for.
        """
        if batch_size != 1:
            raise ForetokenError(
                f"{self._peer.name} runs one prompt at a time; got a batch of {batch_size}",
                hint="compare it with --batch-size 1",
            )
        reset_peak_memory()
        outputs = []
        for task in tasks:
            output = self._peer.generate(
                task.prompt_ids,
                max_new_tokens=task.max_new_tokens,
                temperature=task.temperature,
                seed=task.seed,
                speculative=speculative,
            )
            if len(output.token_ids) != task.max_new_tokens:
                raise ForetokenError(
                    f"{self._peer.name} made {len(output.token_ids)} tokens where "
                    f"{task.max_new_tokens} were asked for",
                    hint="its adapter has to go on after the end of a sequence",
                )
            outputs.append(output)
        return Turn(outputs=outputs, unit_s=[output.seconds for output in outputs], memory=memory())

    def close(self) -> None:
        """Free the peer's models."""
        self._peer.close()


HostBuilder = Callable[[], Host]


def joined(turns: Sequence[Turn]) -> Turn:
    """Return turns that a system had one after another as one, which no phases are known of."""
    cpu_s = [turn.cpu_s for turn in turns if turn.cpu_s is not None]
    return Turn(
        outputs=[output for turn in turns for output in turn.outputs],
        unit_s=[seconds for turn in turns for seconds in turn.unit_s],
        cpu_s=sum(cpu_s) if len(cpu_s) == len(turns) else None,
    )


def units(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Return the items in groups of `size`; the last one may be smaller."""
    return [items[start : start + size] for start in range(0, len(items), size)]


__all__ = [
    "Host",
    "HostBuilder",
    "HostInfo",
    "PausingHost",
    "PeerHost",
    "Task",
    "Turn",
    "joined",
    "units",
]
