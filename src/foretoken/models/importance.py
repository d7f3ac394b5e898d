"""Which parts of a decoder its outputs depend on, judged by texts that it wrote.

Layers are judged by what leaving them out does to the loss; everything narrower by the first-order
estimate of that, |activation × gradient|, summed over tokens. Sources: LLM-Pruner,
arXiv:2305.11627; Sheared LLaMA, arXiv:2310.06694; block influence, ShortGPT, arXiv:2403.03853.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foretoken.errors import ConfigError
from foretoken.models.draft_shape import DraftShape
from foretoken.models.trainable import TrainableModel

NUM_TOKENS = 4096  # that importance is judged by
# Layers are chosen by running texts again and again: fewer tokens of larger models.
MIN_LAYER_TOKENS, MAX_LAYER_TOKENS = 256, 2048
LAYER_WORK = MAX_LAYER_TOKENS * 10**8  # tokens × parameters of one run
MAX_TEXT_TOKENS = 512
# Only so many layers are tried per round: those that change their input least.
NUM_CANDIDATES = 6


@dataclass(frozen=True, slots=True)
class Importance:
    """How much each part of some layers counts, and how strong each channel is where it is normed.

    Args:
        hidden: Channels of the residual stream, over all places that read it, [D].
        heads: Channels of the query heads' outputs, group by group, [kv_heads, heads per kv_head,
            head_dim] for each layer.
        channels: Of the feed-forward part, [I] for each layer.
        energy: Squares of the residual channels as shares of their mean, averaged over tokens, [D]
            for each norm: two per layer in order, then the final one.
    """

    hidden: Tensor
    heads: tuple[Tensor, ...]
    channels: tuple[Tensor, ...]
    energy: tuple[Tensor, ...]


def texts_of(
    target: TrainableModel, examples: Sequence[Sequence[int]], num_tokens: int = NUM_TOKENS
) -> list[Tensor]:
    """Return the first examples, [1, T] each, until there are tokens enough.

    Raises:
        ConfigError: No example has two tokens.
    """
    longest, texts, num_left = min(MAX_TEXT_TOKENS, target.context_limit), [], num_tokens
    for example in examples:
        if num_left <= 0:
            break
        token_ids = list(example[: min(longest, num_left)])
        if len(token_ids) > 1:
            texts.append(torch.tensor([token_ids], device=target.device))
            num_left -= len(token_ids)
    if not texts:
        raise ConfigError(
            f"a target is pruned by texts of at least two tokens; none of {len(examples)} "
            "examples is one",
            hint="collect outputs of the target first",
        )
    return texts


def num_layer_tokens(target: TrainableModel) -> int:
    """Return how many tokens of text layers are chosen by."""
    num_tokens = LAYER_WORK // target.num_parameters
    return max(MIN_LAYER_TOKENS, min(MAX_LAYER_TOKENS, num_tokens))


def select_layers(target: TrainableModel, num_layers: int, texts: Sequence[Tensor]) -> list[int]:
    """Return the layers to keep, ascending: the others are left out one by one.

    In each round it is the layer without which the loss is least, among those whose output is most
    like their input. Judging layer after layer, not once for all, takes the ones that are still
    there into account.

    Args:
        target: A decoder whose layers are `module.model.layers`.
        num_layers: How many to keep, at least one.
        texts: Of `texts_of`.
    """
    kept = list(range(len(_layers(target))))
    while len(kept) > num_layers:
        influence = _block_influence(target, kept, texts)
        candidates = sorted(kept, key=influence.__getitem__)[:NUM_CANDIDATES]
        losses = {
            it: _loss_of(target, [other for other in kept if other != it], texts)
            for it in candidates
        }
        kept.remove(min(candidates, key=losses.__getitem__))
    return kept


@torch.enable_grad()
def measure_importance(
    target: TrainableModel, layers: Sequence[int], texts: Sequence[Tensor]
) -> Importance:
    """Return how much each part counts of a decoder of some of the layers.

    Args:
        target: As for `select_layers`.
        layers: Those that run, ascending.
        texts: Of `texts_of`.
    """
    parts = [_layers(target)[layer] for layer in layers]
    norms = [norm for it in parts for norm in (it.input_layernorm, it.post_attention_layernorm)]
    norms.append(target.module.model.norm)
    outputs = [part.self_attn.o_proj for part in parts]
    downs = [part.mlp.down_proj for part in parts]
    scores: dict[nn.Module, Tensor] = {}
    energy: dict[nn.Module, Tensor] = {}
    for text in texts:
        with _only_layers(target, layers), ExitStack() as stack:
            normed = stack.enter_context(_watched(norms, lambda args, output: (args[0], output)))
            read = stack.enter_context(_watched([*outputs, *downs], lambda args, _: (args[0],)))
            loss = _loss(target, text)
        watched = {module: values[-1] for module, values in (normed | read).items()}
        gradients = torch.autograd.grad(loss, list(watched.values()))
        for (module, values), gradient in zip(watched.items(), gradients, strict=True):
            _add(scores, module, values.detach() * gradient.detach())
        for module, (states, _) in normed.items():
            squares = states.detach().float().square()
            _add(energy, module, squares / squares.mean(dim=-1, keepdim=True))
    num_tokens = sum(text.shape[1] for text in texts)
    shape = DraftShape.of(target.config)
    groups = (shape.kv_heads, shape.heads // shape.kv_heads, shape.head_dim)
    return Importance(
        hidden=torch.stack([scores[norm] for norm in norms]).sum(dim=0),
        heads=tuple(scores[output].view(groups) for output in outputs),
        channels=tuple(scores[down] for down in downs),
        energy=tuple(energy[norm] / num_tokens for norm in norms),
    )


def _add(totals: dict[nn.Module, Tensor], module: nn.Module, values: Tensor) -> None:
    """Add the sizes of a module's values, [1, T, C], to what is known of its channels."""
    sizes = values.abs().sum(dim=(0, 1))
    totals[module] = totals[module] + sizes if module in totals else sizes


def _layers(target: TrainableModel) -> Any:
    return target.module.model.layers  # type: ignore[union-attr]


def _loss(target: TrainableModel, text: Tensor) -> Tensor:
    """Return the sum of the losses of a text's tokens, as a function of activations."""
    module: Any = target.module
    # Weights may be frozen; what is asked for are gradients of activations.
    embedded = module.get_input_embeddings()(text).detach().requires_grad_()
    logits = module(inputs_embeds=embedded, use_cache=False).logits
    return functional.cross_entropy(logits[0, :-1].float(), text[0, 1:], reduction="sum")


@torch.no_grad()
def _loss_of(target: TrainableModel, layers: Collection[int], texts: Sequence[Tensor]) -> float:
    with _only_layers(target, layers):
        return sum(_loss(target, text).item() for text in texts)


@torch.no_grad()
def _block_influence(
    target: TrainableModel, layers: Sequence[int], texts: Sequence[Tensor]
) -> dict[int, float]:
    """Return for each layer 1 - cosine of its input and output, summed over tokens."""
    influence = dict.fromkeys(layers, 0.0)
    parts = {_layers(target)[layer]: layer for layer in layers}
    for text in texts:
        with (
            _only_layers(target, layers),
            _watched(list(parts), lambda args, output: (args[0], output)) as watched,
        ):
            _loss(target, text)
        for part, (before, after) in watched.items():
            likeness = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            influence[parts[part]] += (1 - likeness).sum().item()
    return influence


@contextmanager
def _only_layers(target: TrainableModel, layers: Collection[int]) -> Iterator[None]:
    """Let the other layers hand on what they are given, without computing anything."""
    skipped = [part for layer, part in enumerate(_layers(target)) if layer not in layers]
    try:
        for part in skipped:
            part.forward = _handed_on
        yield
    finally:
        for part in skipped:
            vars(part).pop("forward", None)


def _handed_on(hidden_states: Tensor, **_: Any) -> Tensor:
    return hidden_states


@contextmanager
def _watched(
    modules: Sequence[nn.Module], wanted: Callable[[Any, Any], tuple[Tensor, ...]]
) -> Iterator[dict[nn.Module, tuple[Tensor, ...]]]:
    """Collect what is wanted of each module's arguments and output in the next pass."""
    found: dict[nn.Module, tuple[Tensor, ...]] = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found[module] = wanted(args, output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


__all__ = [
    "Importance",
    "measure_importance",
    "num_layer_tokens",
    "select_layers",
    "texts_of",
]
