"""What single tokens are called and spell, for log-probabilities and for who looks at drafts."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from foretoken.drafters.retokenize import Vocabulary
from foretoken.engine.llm import LLM
from foretoken.engine.logprobs import TokenLogprobs
from foretoken.errors import ModelError

MIN_LOGPROB = -9999.0  # stands for minus infinity, which JSON cannot say; OpenAI's


class TokenTexts:
    """Names and spellings of a model's tokens.

    Args:
        llm: The model; one without tokenizer has tokens that spell nothing.
    """

    def __init__(self, llm: LLM) -> None:
        self._special: dict[int, str] = {}
        self._spellings: Sequence[bytes] = ()
        self.spelling = self._table_spelling
        if llm.tokenizer is None:
            return
        try:
            vocabulary = Vocabulary(llm.tokenizer, llm.info.name, llm.info.vocab_size)
        except ModelError:  # tokens of an unknown kind are decoded one by one
            decode = llm.tokenizer.decode
            self.spelling = lru_cache(maxsize=2**16)(lambda token_id: decode([token_id]).encode())
            return
        self._spellings = vocabulary.spellings
        self._special = {token_id: name for name, token_id in vocabulary.special_ids.items()}

    def _table_spelling(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text; none for special tokens."""
        return self._spellings[token_id] if token_id < len(self._spellings) else b""

    def name(self, token_id: int) -> str:
        """Return what a token is called: its text, or its bytes if it is a part of a character."""
        spelling = self.spelling(token_id)
        if not spelling:
            return self._special.get(token_id, f"token_id:{token_id}")
        try:
            return spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling)

    def chat_logprobs(self, entries: Sequence[TokenLogprobs]) -> list[dict[str, Any]]:
        """Return log-probabilities in the form of chat completions."""
        return [
            {
                **self._chat_token(entry.token_id, entry.logprob),
                "top_logprobs": [self._chat_token(*pair) for pair in entry.top],
            }
            for entry in entries
        ]

    def _chat_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        name = self.name(token_id)
        spelled = self.spelling(token_id) or name.encode()
        return {"token": name, "logprob": finite(logprob), "bytes": list(spelled)}


class TextCursor:
    """Goes along a text token by token.

    Args:
        texts: The tokens.
        offset: Characters of the text before the first of them.
    """

    def __init__(self, texts: TokenTexts, offset: int = 0) -> None:
        self.offset = offset
        self._texts = texts
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def advance(self, token_id: int) -> str:
        """Return the characters that a token completes, and go behind them."""
        text = self._decoder.decode(self._texts.spelling(token_id))
        self.offset += len(text)
        return text


def finite(logprob: float) -> float:
    """Return a log-probability that JSON can say."""
    return max(logprob, MIN_LOGPROB)


__all__ = ["MIN_LOGPROB", "TextCursor", "TokenTexts", "finite"]
