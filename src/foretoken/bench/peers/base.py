"""The peer contract: everything the bench knows about another system.

A peer is one file in this package, one line in the table of `__init__.py`, and the package it
needs in the extra `peers`. It imports that package inside `load`, never when its file is imported.

One policy for all: a peer makes exactly `max_new_tokens` tokens. It goes on after an
end-of-sequence token as the bench lets Foretoken do, so that every system does the same work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from foretoken.errors import ConfigError

PEER_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSpec:
    """What to load, the same for every system of a comparison.

    Args:
        model: Transformers directory of the target: config.json, safetensors, tokenizer.
        draft: The same of the draft model; None if only plain decoding is compared.
        dtype: "float32" or "bfloat16", of weights and arithmetic.
        threads: CPU threads.
        num_draft_tokens: Draft tokens per step, a constant chain.
        work_dir: Where converted files go; it exists, and what is there from an earlier run is
            reused. Names in it tell apart all that matters (model, dtype, version of the format).
    """

    model: Path
    draft: Path | None
    dtype: str
    threads: int
    num_draft_tokens: int
    work_dir: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerOutput:
    """One prompt continued.

    Args:
        token_ids: The new tokens, without the prompt; exactly as many as were asked for.
        seconds: From the call to the last token, prefill included, loading not.
        prefill_s: From the call to the first token, where the system tells.
        num_steps: Passes of the target that gave tokens, the one over the end of the prompt
            included, where the system tells.
        num_draft_tokens: Draft tokens that the target scored, where the system tells.
        num_accepted: Those of them that it kept, where the system tells.
    """

    token_ids: list[int]
    seconds: float
    prefill_s: float | None = None
    num_steps: int | None = None
    num_draft_tokens: int | None = None
    num_accepted: int | None = None


class Peer(Protocol):
    """Another system that continues prompts, plainly and with a draft model.

    It runs in a process of its own and serves one call at a time.

    Attributes:
        name: As users type it after `--against`.
        version: Package and version, such as "llama-cpp-python 0.3.36", and whatever else of its
            setting a reader of the numbers has to know.
    """

    name: ClassVar[str]
    version: str

    @classmethod
    def load(cls, spec: PeerSpec) -> Peer:
        """Load both models, converting them first where needed.

        Raises:
            ConfigError: Its package is missing (see `missing_package`), or it cannot do what
                the spec asks.
        """
        ...

    def generate(
        self,
        prompt_ids: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        speculative: bool,
    ) -> PeerOutput:
        """Continue one prompt; nothing of an earlier call is reused, prompt caches included.

        Args:
            prompt_ids: At least one token id, special tokens included.
            max_new_tokens: Exactly this many are made; prompt and output fit the context.
            temperature: 0 is greedy. Above, no top-k, top-p or min-p.
            seed: For sampling.
            speculative: With the draft model; only if the spec has one.

        Raises:
            RequestError: It cannot do what is asked, or is known to answer it wrongly. The bench
                tries before it measures, and leaves the peer out where it cannot.
        """
        ...

    def close(self) -> None:
        """Free the models; called once."""
        ...


def missing_package(peer: str, packages: str) -> ConfigError:
    """Return the error of a peer whose package is not installed.

    Args:
        peer: Its name.
        packages: What to install, as pip wants it.
    """
    return ConfigError(
        f"--against {peer} needs a package that is not installed: {packages}",
        hint=f"pip install {packages}",
    )
