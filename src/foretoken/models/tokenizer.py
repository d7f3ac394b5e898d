"""Text to token ids and back, and the check that two models speak of the same tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foretoken.errors import ModelError, RequestError, VocabularyMismatchError
from foretoken.models.adapter import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "*.model", "spiece*")


class Tokenizer:
    """A transformers tokenizer, as far as generation needs it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # What transformers adds for these classes is cleaning up, if it is on; without it the
        # library underneath answers three times as fast.
        is_general = type(tokenizer).__name__ in GENERAL_CLASSES
        cleans_up = getattr(tokenizer, "clean_up_tokenization_spaces", True)
        self._encoder = tokenizer.backend_tokenizer if is_general else None
        self._decoder = self._encoder if not cleans_up else None

    @classmethod
    def load(cls, path: str) -> Tokenizer | None:
        """Load the tokenizer beside a model; None if the directory has none.

        Raises:
            ModelError: There is one, but it cannot be read.
        """
        directory = Path(path).expanduser()
        if directory.is_dir() and not any(any(directory.glob(name)) for name in TOKENIZER_FILES):
            return None
        source = str(directory) if directory.is_dir() else path
        try:
            return cls(_tokenizer_class(directory).from_pretrained(source))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelError(
                f"the tokenizer of {path!r} cannot be loaded: {_in_one_line(error)}",
                hint="check tokenizer.json and tokenizer_config.json in the model directory",
            ) from error

    def encode(self, text: str, *, adds_special: bool = True) -> list[int]:
        """Return the token ids of a prompt, with the special tokens the model expects.

        Args:
            text: The prompt.
            adds_special: False for a text that has them already, as chat templates write them.
        """
        if self._encoder is not None:
            # With each text, as transformers does: others may use the tokenizer in between.
            self._encoder.no_truncation()
            self._encoder.no_padding()
            self._encoder.encode_special_tokens = self._tokenizer.split_special_tokens
            ids: list[int] = self._encoder.encode(text, add_special_tokens=adds_special).ids
            return ids
        return list(
            self._tokenizer.encode(
                text, truncation=False, verbose=False, add_special_tokens=adds_special
            )
        )

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; special tokens have none."""
        if self._decoder is not None:
            return str(self._decoder.decode(list(token_ids), skip_special_tokens=True))
        text = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text if isinstance(text, str) else "".join(text)

    @property
    def fast_tokenizer(self) -> Any | None:
        """The tokenizer of the tokenizers library underneath, None if it is of another kind."""
        return getattr(self._tokenizer, "backend_tokenizer", None)

    @property
    def chat_template(self) -> str | None:
        """How conversations are written, as a Jinja template; None if nothing is said."""
        return getattr(self._tokenizer, "chat_template", None)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None = None,
        opens_turn: bool = True,
        continues_last: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Return a conversation as the text that a chat model goes on from.

        transformers runs the template, in Jinja's sandbox.

        Args:
            messages: Each with a "role" and a "content", as the template wants them.
            template: Jinja template; None for the tokenizer's own.
            opens_turn: Whether the text ends where the assistant begins to speak.
            continues_last: Whether the last message is left open instead.
            variables: What else the template may look at.

        Raises:
            RequestError: There is no template, it refuses the conversation, or a variable has a
                name that transformers keeps for itself.
        """
        if template is None and not self.chat_template:
            raise RequestError(
                "the model has no chat template, so that conversations cannot be written for it",
                hint="give a plain prompt, or give a template with --chat-template FILE",
            )
        kept = {"messages", "self", *signature(self._tokenizer.apply_chat_template).parameters}
        for name in kept & set(variables or ()):
            raise RequestError(
                f"a chat template's variable cannot be called {name!r}", hint="leave it out"
            )
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages),
                **(variables or {}),
                chat_template=template,
                add_generation_prompt=opens_turn and not continues_last,
                continue_final_message=continues_last,
                tokenize=False,
            )
        except Exception as error:  # templates raise what they like
            raise RequestError(
                f"the chat template refuses the conversation: {_in_one_line(error)}",
                hint="check roles, their order and the template's variables",
            ) from error
        return str(text)

    @property
    def vocabulary(self) -> dict[str, int]:
        """Every token text and its id."""
        return dict(self._tokenizer.get_vocab())


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _tokenizer_class(directory: Path) -> Any:
    """Return the class that loads a directory's tokenizer.

    One that is all in tokenizer.json needs no class of its own; finding out through transformers
    costs more than a second of imports.
    """
    try:
        config = json.loads((directory / "tokenizer_config.json").read_text(encoding="utf-8"))
        is_general = config.get("tokenizer_class") in GENERAL_CLASSES
    except (OSError, ValueError, AttributeError):
        is_general = False
    if is_general and (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def check_same_vocabulary(
    target: LanguageModel,
    target_tokenizer: Tokenizer | None,
    draft: LanguageModel,
    draft_tokenizer: Tokenizer | None,
) -> None:
    """Check that a draft model's token ids mean what the target's mean.

    Models of one family may pad their logits to different widths; their tokens must agree.
    Without both tokenizers the widths must.

    Raises:
        VocabularyMismatchError: They differ.
    """
    if target_tokenizer is None or draft_tokenizer is None:
        if target.info.vocab_size != draft.info.vocab_size:
            raise VocabularyMismatchError(
                f"draft {draft.info.vocab_size} tokens, target {target.info.vocab_size}"
            )
        return
    ours, theirs = target_tokenizer.vocabulary, draft_tokenizer.vocabulary
    if len(ours) != len(theirs):
        raise VocabularyMismatchError(f"draft {len(theirs)} tokens, target {len(ours)}")
    for text, token_id in sorted(ours.items(), key=lambda item: item[1]):
        if theirs.get(text) != token_id:
            raise VocabularyMismatchError(
                f"draft {theirs.get(text)} for {text!r}, target {token_id}"
            )
    if draft.info.vocab_size < len(theirs):
        raise VocabularyMismatchError(
            f"draft model {draft.info.vocab_size} logits for {len(theirs)} tokens"
        )
