"""Drafters: cheap guesses of what the target will say. One file each, one line each here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from foretoken.core.options import ComponentSpec, build_options
from foretoken.core.registry import Registry
from foretoken.drafters.base import Drafter, DrafterHost

DRAFTERS: Registry[type[Drafter]] = Registry(
    "drafter",
    {
        "none": "foretoken.drafters.none:NoDrafter",
        "prompt-lookup": "foretoken.drafters.prompt_lookup:PromptLookupDrafter",
        "draft-model": "foretoken.drafters.draft_model:DraftModelDrafter",
        "universal": "foretoken.drafters.universal:UniversalDrafter",
        "early-exit": "foretoken.drafters.early_exit:EarlyExitDrafter",
        "kangaroo": "foretoken.drafters.kangaroo:KangarooDrafter",
        "mtp": "foretoken.drafters.mtp:MtpDrafter",
        "layer-skip": "foretoken.drafters.layer_skip:LayerSkipDrafter",
        "loopspec": "foretoken.drafters.loopspec:LoopSpecDrafter",
        "forced": "foretoken.drafters.forced:ForcedDrafter",
        "suffix": "foretoken.drafters.suffix:SuffixDrafter",
        "reference": "foretoken.drafters.reference:ReferenceDrafter",
        "rest": "foretoken.drafters.rest:RestDrafter",
        "token-recycling": "foretoken.drafters.token_recycling:TokenRecyclingDrafter",
        "lookahead": "foretoken.drafters.lookahead:LookaheadDrafter",
        "merged": "foretoken.drafters.merged:MergedDrafter",
        "tail": "foretoken.drafters.tail:TailDrafter",
        "medusa": "foretoken.drafters.medusa:MedusaDrafter",
        "hydra": "foretoken.drafters.hydra:HydraDrafter",
        "eagle": "foretoken.drafters.eagle:EagleDrafter",
        "parallel": "foretoken.drafters.parallel:ParallelDrafter",
        "graft": "foretoken.drafters.graft:GraftDrafter",
        "speed": "foretoken.drafters.speed:SpeedDrafter",
        "cascade": "foretoken.drafters.cascade:CascadeDrafter",
    },
    group="foretoken.drafters",
)


def prepare_drafter(spec: ComponentSpec) -> Callable[[DrafterHost], Drafter]:
    """Check a spec and return what builds its drafter, once there is a target.

    The result raises ModelError when the drafter's own model cannot be loaded or does not fit.

    Raises:
        UnknownNameError: The name or one of its options does not exist.
        ConfigError: An option's value is not allowed, or a required one is missing.
    """
    drafter_class = DRAFTERS.load(spec.name)
    return partial(drafter_class.create, build_options(drafter_class.Options, spec))
