"""The smallest kind of head: a matrix on the last state that guesses one token ahead."""

from dataclasses import dataclass

import torch
from torch import nn

from foretoken.core.draft import Draft, SiblingDraw
from foretoken.core.options import ComponentSpec, build_options
from foretoken.core.tree import TokenTree
from foretoken.drafters.base import Drafter, DrafterNeeds, Taxonomy
from foretoken.models.heads.files import read_head, save_head
from foretoken.training.heads.kinds import HeadKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyDesign:
    scale: float = 1.0


class ToyHead(nn.Module):
    """With the state of token t, guesses token t + 2: the one after the pending token."""

    def __init__(self, size, vocab_size):
        super().__init__()
        self.linear = nn.Linear(size, vocab_size, bias=False)

    def forward(self, states):
        return self.linear(states)


def build(shape, tensors, options):
    design = build_options(ToyDesign, ComponentSpec("toy", options))
    module = ToyHead(shape.hidden_size, shape.vocab_size)
    with torch.no_grad():
        module.linear.weight.mul_(design.scale)
    return module


def loss(module, batch, divergence):
    [states] = batch.hidden.values()
    guessed = module(states[:, :-2])  # token t + 2 is what the logits behind token t + 1 say
    counts = batch.is_output[:, 2:]
    return divergence(guessed[counts], batch.logits[:, 1:-1][counts]).mean()


def save(module, shape, folder, card):
    save_head(module.state_dict(), "toy", shape, {}, folder, card)


KIND = HeadKind(
    name="toy",
    hidden_layers=lambda num_layers, _options: (num_layers,),
    build=build,
    loss=loss,
    save=save,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyOptions:
    path: str


class ToyDrafter(Drafter):
    """Serves the toy head: one token, the first choice."""

    Options = ToyOptions
    taxonomy = Taxonomy(
        source="heads", is_trained=True, termination="static", structure="chain", reference="tests"
    )
    draws = frozenset({SiblingDraw.DETERMINISTIC})

    def __init__(self, head, layer):
        self.needs = DrafterNeeds(hidden_layers=(layer,))
        self.head, self.layer = head, layer
        self.states = {}

    @classmethod
    def create(cls, options, host):
        info = host.target.info
        files = read_head(options.path, "toy", info)
        head = ToyHead(info.hidden_size, info.vocab_size)
        files.fill(head)
        return cls(head, info.num_layers)

    def observe(self, standing):
        for told in standing:
            self.states[told.request_id] = told.hidden[self.layer][-1].float().clone()

    @torch.inference_mode()
    def propose(self, contexts):
        drafts = []
        for context in contexts:
            chain, state = [context.token_ids[-1]], self.states.get(context.request_id)
            if state is not None and context.budget.max_nodes and context.budget.max_depth:
                chain.append(int(self.head(state).argmax()))
            drafts.append(Draft.from_drafter("toy", TokenTree.chain(chain)))
        return drafts

    def stop(self, request_id):
        self.states.pop(request_id, None)
