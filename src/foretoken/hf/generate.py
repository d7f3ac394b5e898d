"""The decoding loop that `model.generate(..., custom_generate=foretoken.hf.generate)` runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foretoken.core.params import MAX_SEED
from foretoken.engine.engine import Engine
from foretoken.engine.request import Emission
from foretoken.hf.engines import engine_for
from foretoken.hf.rows import Row, Streamer, check_positions, split_padding
from foretoken.models.generation import Wishes, as_output, read_wishes, refusal
from foretoken.planner.plan import Plan

_MODES = ("greedy_search", "sample")
# What `generate` hands over for the module's own forward; the engine has its own of each.
_IGNORED = {"use_cache", "logits_to_keep", "cache_position"}
_READ = {"attention_mask", "position_ids", "past_key_values"}


def generate(  # noqa: PLR0913 - the first seven are those of transformers' own loop
    model: Any,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: Any,
    synced_gpus: bool = False,
    streamer: Streamer | None = None,
    *,
    drafters: str | Sequence[str] = "auto",
    verifier: str = "coupled",
    max_nodes: int | None = None,
    adaptive: bool | None = None,
    kv_cache_tokens: int | None = None,
    seed: int | None = None,
    tokenizer: Any = None,
    **model_kwargs: Any,
) -> Any:
    """Continue every row; the tokens are the model's own, several per pass.

    transformers calls this once it has prepared its arguments: give it to `generate` of a model as
    `custom_generate`. Arguments from `drafters` to `seed` may be given to `generate` itself.
    `streamer` and `tokenizer` it keeps to itself: bind them with `functools.partial`.

    The model is not changed; what is made of it is kept until its weights change or it is gone.

    Args:
        model: A causal language model that transformers supports through its attention interface.
        input_ids: Prompts, [B, T], padded at the left.
        logits_processor: Prepared by transformers, the user's own included.
        stopping_criteria: Likewise.
        generation_config: Likewise.
        synced_gpus: Has to be false.
        streamer: Gets the prompt, then each token of the one row, as soon as it is certain.
        drafters: As of `foretoken.LLM`; "auto" is `suffix` and
            `token-recycling` here, by plan.
        verifier: As of `foretoken.LLM`.
        max_nodes: As of `foretoken.LLM`.
        adaptive: As of `foretoken.LLM`.
        kv_cache_tokens: As of `foretoken.LLM`.
        seed: Row b is sampled with seed + b. None draws one from torch's generator, so that
            `torch.manual_seed` settles the tokens.
        tokenizer: transformers' tokenizer, for drafters that need one; by default that of the
            directory that the model was loaded from.
        model_kwargs: Prepared by transformers.

    Returns:
        [B, T + new tokens], rows that end early filled with the pad token; with
        `return_dict_in_generate` transformers' output, and the statistics of each row in `stats`.

    Raises:
        RequestError: The call asks for what cannot be served, or a row does not fit the model.
        ConfigError: An option is not allowed.
        ModelError: The model, or a drafter's, cannot be served.
    """
    _check_config(generation_config, synced_gpus)
    if streamer is not None and len(input_ids) > 1:
        raise refusal("streamer", f"it takes one row, and there are {len(input_ids)}")
    names = (drafters,) if isinstance(drafters, str) else tuple(drafters)
    plan = Plan(drafters=names, verifier=verifier, max_nodes=max_nodes, adaptive=adaptive)
    engine = engine_for(model, plan, kv_cache_tokens=kv_cache_tokens, tokenizer=tokenizer)
    _check_inputs(model_kwargs)
    wishes = read_wishes(
        logits_processor,
        stopping_criteria,
        is_sampled=bool(generation_config.do_sample),
        prompt_length=input_ids.shape[1],
        vocab_size=engine.parts.target.info.vocab_size,
    )
    rows = _rows(engine, input_ids, wishes, model_kwargs, seed, streamer)
    _run(engine, rows)
    sequences = _assemble(rows, _pad_id(generation_config, wishes)).to(input_ids.device)
    if not generation_config.return_dict_in_generate:
        return sequences
    return as_output(sequences, [row.request.stats for row in rows])


def _check_config(config: Any, synced_gpus: bool) -> None:
    """Refuse what no request can express.

    Raises:
        RequestError: Says which option, and what to do.
    """
    mode = config.get_generation_mode().value
    if mode not in _MODES:
        raise refusal(f"options that ask for {mode}", "it samples, or takes the likeliest token")
    if synced_gpus:
        raise refusal("synced_gpus", "the model has to be on one device")
    if config.return_dict_in_generate:
        for name in ("output_scores", "output_logits"):
            if getattr(config, name):
                raise refusal(name, "scores are not kept for each token")


def _check_inputs(model_kwargs: Mapping[str, Any]) -> None:
    """Refuse what is for the module's own forward, and means something.

    Raises:
        RequestError: Says what.
    """
    for name, value in model_kwargs.items():
        if value is not None and name not in _IGNORED | _READ:
            raise refusal(name, "it continues token ids, and returns token ids")
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length() > 0:
        raise refusal("past_key_values", "it keeps its own cache")


def _rows(
    engine: Engine,
    input_ids: Tensor,
    wishes: Wishes,
    model_kwargs: Mapping[str, Any],
    seed: int | None,
    streamer: Streamer | None,
) -> list[Row]:
    """Return the rows with their requests, all of them checked; nothing runs yet."""
    ids = input_ids.cpu()
    mask = model_kwargs.get("attention_mask")
    lengths = split_padding(ids, None if mask is None else mask.cpu())
    check_positions(model_kwargs.get("position_ids"), lengths)
    if seed is None:
        seed = int(torch.randint(2**63 - 1, ()))
    room = wishes.max_length - ids.shape[1]
    rows = []
    for index, (row_ids, length) in enumerate(zip(ids, lengths, strict=True)):
        padding = row_ids[: len(row_ids) - length]
        params = wishes.params_for(padding, (seed + index) % MAX_SEED, room)
        request = engine.new_request(row_ids[len(padding) :].tolist(), params)
        rows.append(Row(request, row_ids, room, wishes.criteria, streamer))
    return rows


def _run(engine: Engine, rows: Sequence[Row]) -> None:
    """Run all rows to their ends; if one fails, none is left behind in the engine."""
    by_id = {row.request.request_id: row for row in rows}
    try:
        for row in rows:
            row.start()
            engine.submit(row.request)
        while engine.num_unfinished:
            for emission in engine.step():
                _take(engine, by_id[emission.request_id], emission)
        for row in rows:
            row.finish()
    finally:
        for request_id in by_id:
            engine.abort(request_id)


def _take(engine: Engine, row: Row, emission: Emission) -> None:
    if row.request.error is not None:
        raise row.request.error
    if not row.take(emission.token_ids):
        engine.abort(emission.request_id)


def _pad_id(config: Any, wishes: Wishes) -> int:
    pad_id = config.pad_token_id
    if pad_id is None:
        return wishes.eos_ids[0] if wishes.eos_ids else 0
    return int(pad_id)


def _assemble(rows: Sequence[Row], pad_id: int) -> Tensor:
    """Return all rows as one tensor, [B, T + new tokens]."""
    longest = max(row.length for row in rows)
    sequences = torch.full((len(rows), longest), pad_id)
    for index, row in enumerate(rows):
        sequences[index, : row.length] = row.token_ids
    return sequences


__all__ = ["generate"]
