"""Grammars that an output must follow: JSON schemas, regular expressions and Lark.

llguidance does the parsing: it turns a grammar into a matcher over the bytes of tokens, which says
after each token what may come next. It is imported with the first grammar.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foretoken.core.grammar import GrammarState
from foretoken.core.params import SamplingParams
from foretoken.errors import RequestError
from foretoken.models import grammar_errors
from foretoken.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_COMPILED = 64  # grammars that are kept compiled; a matcher takes some 100 kB
MAX_MASKS = 512  # of one step of one request: one for each node that anybody asks about

# Between the tokens of a JSON text, unless the schema's "x-guidance" says otherwise: a space, or
# at most two line ends with an indent. Without a bound, a model may write spaces to the end.
# Source: llama.cpp's rule for the same.
JSON_WHITESPACE = r" |\n{1,2}[ \t]{0,20}"

# The matcher's own end of text: a token of no model, so that a model may have any number of
# end-of-sequence tokens, none, or one that is text elsewhere.
END = "<|end of the grammar's text|>"


class GrammarCompiler:
    """Compiles the grammars of requests for one model; compiled ones are kept for later requests.

    The first grammar makes a table of the tokenizer's tokens, which takes about a second for 50
    thousand tokens. May be used from several threads.

    Args:
        tokenizer: The model's; None if it has none.
        vocab_size: V, the width of its logits, which may be more or less than the tokenizer has.
        eos_ids: Token ids that end a sequence, possibly none.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, vocab_size: int, eos_ids: Collection[int]
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = sorted(token_id for token_id in eos_ids if token_id < vocab_size)
        self._tokens: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, params: SamplingParams, num_prompt_ids: int) -> GrammarState | None:
        """Return the state of a new request; None if it asks for no grammar.

        With `ignore_eos` no end-of-sequence token is ever allowed: the text ends where nothing
        can follow it, or at the request's own limits.

        Args:
            params: What the request asks.
            num_prompt_ids: Length of its prompt, which is not part of the text.

        Raises:
            RequestError: The grammar is wrong, with the place; it matches nothing; or the model's
                tokenizer cannot be used with grammars.
        """
        grammars = {"json_schema": params.json_schema, "regex": params.regex, "lark": params.lark}
        for kind, text in grammars.items():
            if text is not None:
                with self._lock:
                    matcher, end_id = self._matcher(kind, text)
                return TextState(
                    matcher,
                    end_id,
                    vocab_size=self._vocab_size,
                    eos_ids=() if params.ignore_eos else self._eos_ids,
                    num_prompt_ids=num_prompt_ids,
                )
        return None

    def _matcher(self, kind: str, text: str) -> tuple[LLMatcher, int]:
        if self._tokens is None:
            self._tokens = _token_table(self._tokenizer)
        key = kind, text
        if key not in self._compiled:
            self._compiled[key] = _compile(self._tokens, kind, text)
            if len(self._compiled) > MAX_COMPILED:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key], self._tokens.eos_token


class TextState:
    """Where one request's output stands in its grammar.

    One matcher goes from state to state: forward over what is new, back over what differs, so
    that a node of a tree costs what it adds to its neighbour. The answers depend on the
    arguments alone.

    Args:
        start: The compiled grammar before any token; never moved.
        end_id: Token by which the matcher says that the text may end; one of no model.
        vocab_size: V.
        eos_ids: Token ids by which the model ends a sequence, below V.
        num_prompt_ids: Tokens before the text.
    """

    def __init__(
        self,
        start: LLMatcher,
        end_id: int,
        *,
        vocab_size: int,
        eos_ids: Sequence[int],
        num_prompt_ids: int,
    ) -> None:
        self._start = start
        self._end_id = end_id
        self._vocab_size = vocab_size
        self._num_shared_ids = min(vocab_size, end_id)  # known to both model and tokenizer
        self._eos_ids = list(eos_ids)
        self._is_eos = frozenset(eos_ids)
        self._num_prompt_ids = num_prompt_ids
        self._matcher = start.deep_copy()
        self._consumed: list[int] = []  # what the matcher has taken in
        self._output: list[int] = []  # what the masks are about: one entry per path after it
        self._masks: dict[tuple[int, ...], bytes | None] = {}

    def allowed(self, token_ids: Sequence[int], path: Sequence[int] = ()) -> NDArray[np.bool_]:
        """Return which tokens may come next, [V]; a fresh array.

        Nothing is allowed after a path that the grammar does not allow, nor after a complete text
        of a model without end-of-sequence tokens: `is_complete` tells the latter apart.

        Raises:
            RequestError: The grammar became too complex to follow, or asks for something that the
                model has no token for.
        """
        text, has_ended = self._split(token_ids, path)
        mask = self._mask(text)
        if mask is None:
            return np.zeros(self._vocab_size, dtype=np.bool_)
        row, may_end = self._row(mask)
        if has_ended:
            row[:] = False
        elif not may_end and not row.any():
            raise grammar_errors.unspeakable()
        row[self._eos_ids] = may_end
        return row

    def forced(self, token_ids: Sequence[int]) -> list[int]:
        """Return the tokens that the grammar leaves no choice about, possibly none."""
        text, has_ended = self._split(token_ids, ())
        try:
            if has_ended or not self._follow(text):
                return []
            forced_ids = self._matcher.compute_ff_tokens()
            self._check()
        except RequestError:  # whoever asks for the mask here learns of it
            return []
        for place, token_id in enumerate(forced_ids):
            if token_id >= self._num_shared_ids or token_id in self._is_eos:
                return forced_ids[:place]
        return forced_ids

    def is_complete(self, token_ids: Sequence[int], path: Sequence[int] = ()) -> bool:
        """Return whether the text is whole and nothing but its end can follow."""
        text, has_ended = self._split(token_ids, path)
        try:
            if not self._follow(text) or not self._matcher.is_accepting():
                return False
            mask = self._mask(text)
        except RequestError:  # whoever asks for the mask here learns of it
            return False
        if mask is None:
            return False
        row, may_end = self._row(mask)
        return may_end and (has_ended or not row.any())

    # -- from tokens to masks ----------------------------------------------------------------

    def _split(self, token_ids: Sequence[int], path: Sequence[int]) -> tuple[list[int], bool]:
        """Return the tokens of the text, and whether an end-of-sequence token came after them."""
        output = list(token_ids[self._num_prompt_ids :])
        if output != self._output:
            self._output = output
            self._masks.clear()
        text = [*output, *path]
        if self._is_eos.isdisjoint(text):
            return text, False
        end = next(place for place, token_id in enumerate(text) if token_id in self._is_eos)
        return text[:end], True

    def _row(self, mask: bytes) -> tuple[NDArray[np.bool_], bool]:
        """Return which tokens of text may follow, [V], and whether the text may end here."""
        bits = np.unpackbits(
            np.frombuffer(mask, dtype=np.uint8), count=self._end_id + 1, bitorder="little"
        ).view(np.bool_)
        row = np.zeros(self._vocab_size, dtype=np.bool_)
        row[: self._num_shared_ids] = bits[: self._num_shared_ids]
        row[self._eos_ids] = False
        return row, bool(bits[self._end_id])

    def _mask(self, text: list[int]) -> bytes | None:
        """Return the matcher's mask after a text, a bit per token; None if it does not allow it."""
        key = tuple(text[len(self._output) :]) if len(text) >= len(self._output) else None
        if key in self._masks:
            return self._masks[key]
        mask = None
        if self._follow(text):
            mask = self._matcher.compute_bitmask()
            self._check()
        if key is not None:
            if len(self._masks) >= MAX_MASKS:
                self._masks.clear()
            self._masks[key] = mask
        return mask

    def _follow(self, text: list[int]) -> bool:
        """Bring the matcher to the end of a text; return whether the grammar allows it all."""
        num_shared = self._num_shared(text)
        num_back = len(self._consumed) - num_shared
        if num_back:
            del self._consumed[num_shared:]
            if not self._matcher.rollback(num_back):
                self._restart()
                num_shared = 0
        rest = text[num_shared:]
        known = rest
        if max(rest, default=0) >= self._end_id:  # a token that the tokenizer does not have
            known = rest[: next(i for i, token_id in enumerate(rest) if token_id >= self._end_id)]
        num_taken = self._matcher.try_consume_tokens(known) if known else 0
        self._check()
        self._consumed += known[:num_taken]
        return num_taken == len(rest)

    def _num_shared(self, text: list[int]) -> int:
        """Return how many tokens the text begins with that the matcher has taken in."""
        consumed, shared = self._consumed, len(self._output)
        if consumed[:shared] != text[:shared]:
            shared = 0
        limit = min(len(consumed), len(text))
        shared = min(shared, limit)
        while shared < limit and consumed[shared] == text[shared]:
            shared += 1
        return shared

    def _check(self) -> None:
        """Raise if the matcher has failed; it never leaves that state, so a new one takes over."""
        if self._matcher.is_error():
            failed = self._matcher
            self._restart()
            raise grammar_errors.too_complex(failed.get_error())

    def _restart(self) -> None:
        self._matcher = self._start.deep_copy()
        self._consumed = []


# -- llguidance ------------------------------------------------------------------------------


def _token_table(tokenizer: Tokenizer | None) -> LLTokenizer:
    """Return the tokens of a tokenizer, with one more that stands for the end of the text."""
    from llguidance import LLTokenizer

    backend = tokenizer.fast_tokenizer if tokenizer is not None else None
    if backend is None:
        raise RequestError(
            "a grammar needs a tokenizer of the tokenizers library; the model has "
            + ("none" if tokenizer is None else "one of another kind"),
            hint="leave the grammar out, or add a tokenizer.json to the model directory",
        )
    end_id = backend.get_vocab_size(with_added_tokens=True)
    described = json.loads(backend.to_str())
    described["padding"] = described["truncation"] = None
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    described["added_tokens"].append({"id": end_id, "content": END, "special": True, **flags})
    try:
        if backend.id_to_token(end_id) is not None:
            raise ValueError(f"its token ids have gaps below {end_id}")
        return LLTokenizer(json.dumps(described), eos_token=end_id)
    except ValueError as error:
        raise RequestError(
            f"the model's tokenizer cannot be used with grammars: {error}",
            hint="leave the grammar out; byte-level and byte-fallback tokenizers can be used",
        ) from None


def _compile(tokens: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """Return the matcher of a grammar before any token."""
    from llguidance import LLMatcher

    schema = None
    if kind == "json_schema":
        schema = grammar_errors.parse_schema(text)
        grammar = _schema_grammar(schema)
    elif kind == "regex":
        grammar_errors.check_regex(text)
        grammar = LLMatcher.grammar_from_regex(text)
    else:
        grammar = LLMatcher.grammar_from_lark(text)
    matcher = _new_matcher(tokens, grammar)
    if matcher.is_error():
        message = matcher.get_error()
        if kind == "json_schema":
            raise grammar_errors.schema_error(
                text, schema, message, lambda part: _explain(tokens, part)
            )
        raise {"regex": grammar_errors.regex_error, "lark": grammar_errors.lark_error}[kind](
            text, message
        )
    first = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
    if matcher.is_error():
        raise grammar_errors.unsatisfiable(kind, matcher.get_error())
    if matcher.is_accepting() and np.bitwise_count(first).sum() == 1:
        raise grammar_errors.unsatisfiable(kind, "nothing but the empty text matches it")
    return matcher


def _new_matcher(tokens: LLTokenizer, grammar: str) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(verbose_errors=False)
    return LLMatcher(tokens, grammar, log_level=0, limits=limits)


def _schema_grammar(schema: Any) -> str:
    from llguidance import LLMatcher

    if schema is True:
        schema = {}
    chosen = schema.get("x-guidance", {}) if isinstance(schema, dict) else None
    if isinstance(chosen, dict) and not any(key.startswith("whitespace") for key in chosen):
        schema = {**schema, "x-guidance": {**chosen, "whitespace_pattern": JSON_WHITESPACE}}
    return LLMatcher.grammar_from_json_schema(json.dumps(schema))


def _explain(tokens: LLTokenizer, schema: Any) -> str:
    return _new_matcher(tokens, _schema_grammar(schema)).get_error()
