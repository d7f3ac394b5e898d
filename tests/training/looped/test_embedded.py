"""The embedded looped model: what its card says is what it is."""

import json
import re

import pytest
import torch

from foretoken.assets import EMBEDDED, EMBEDDED_MODELS
from foretoken.engine.names import resolve_model
from foretoken.errors import ModelError
from foretoken.models.loops import LoopShape
from foretoken.models.tokenizer import Tokenizer
from foretoken.models.trainable import load_trainable

FOLDER = EMBEDDED_MODELS["looped"]


def test_its_name_is_known():
    assert resolve_model("looped") == str(FOLDER)
    assert resolve_model("stories") == str(EMBEDDED["stories"].target)
    with pytest.raises(ModelError) as caught:
        resolve_model("loopd")
    assert "'looped'" in caught.value.hint


def test_the_card_has_the_numbers_of_its_record():
    record = json.loads((FOLDER / "training_record.json").read_text())
    card = (FOLDER / "README.md").read_text()
    measured = record["measure"]
    rows = re.findall(r"^\| (\d) \| ([\d.]+) \| ([\d.]+)% \|$", card, re.MULTILINE)
    assert rows == [
        (str(depth), f"{bits:.3f}", f"{100 * share:.1f}")
        for depth, (bits, share) in enumerate(
            zip(measured["bits_per_character"], measured["agreement"], strict=True), start=1
        )
    ]
    assert f"{record['build']['num_parameters']:,}" in card


def test_an_early_guess_is_mostly_right():
    """On its own greedy text 80 % were seen, behind 24 openings and further; here are 4."""
    model = load_trainable(FOLDER)
    assert LoopShape.of(model.config) == LoopShape(prelude=0, group=2, loops=4, coda=0)
    tokenizer = Tokenizer.load(str(FOLDER))
    openings = (EMBEDDED["stories"].target.parent / "openings.txt").read_text().splitlines()
    same = []
    for opening in openings[:4]:
        ids = torch.tensor([tokenizer.encode(opening)])
        asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 32, "do_sample": False}
        text = model.module.generate(ids, **asked)
        with torch.no_grad():
            exits = model.module.exit_logits(text[:, :-1])[:, 0, ids.shape[1] - 1 :]
        choices = exits.argmax(dim=-1)
        same.append(choices[0] == choices[-1])
    assert torch.cat(same).double().mean() > 0.6
