"""Component options: text becomes typed values, and mistakes are named."""

from dataclasses import dataclass

import pytest

from foretoken.core.options import ComponentSpec, build_options
from foretoken.errors import ConfigError, UnknownNameError


@dataclass(frozen=True)
class Options:
    path: str
    depth: int = 4
    share: float = 0.5
    expand: tuple[int, ...] | None = None
    sampled: bool = False


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        ("none", "none", {}),
        ("none:", "none", {}),
        ("draft-model:path=a/b, depth=6", "draft-model", {"path": "a/b", "depth": "6"}),
        ("d:path=C:=x", "d", {"path": "C:=x"}),
    ],
)
def test_spec_is_name_then_options(text, name, options):
    assert ComponentSpec.parse(text) == ComponentSpec(name, options)


def test_spec_prints_as_it_is_written():
    text = "draft-model:path=a,depth=6"
    assert str(ComponentSpec.parse(text)) == text
    assert str(ComponentSpec("none")) == "none"


@pytest.mark.parametrize("text", ["d:path", "d:=3", "d:path=a,depth", ":path=a", "", " "])
def test_malformed_spec_is_refused(text):
    with pytest.raises(ConfigError) as caught:
        ComponentSpec.parse(text)
    assert caught.value.hint


def test_text_becomes_the_type_of_the_field():
    spec = ComponentSpec.parse("d:path=7,depth=6,share=1,expand=1-1-3,sampled=True")
    assert build_options(Options, spec) == Options("7", 6, 1.0, (1, 1, 3), sampled=True)


def test_values_that_are_no_text_are_taken_as_they_are():
    spec = ComponentSpec("d", {"path": "p", "depth": 6, "expand": [1, 3], "sampled": True})
    assert build_options(Options, spec) == Options("p", 6, expand=(1, 3), sampled=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("d:path=p,depth=six", "d:depth is an integer; got 'six'"),
        ("d:path=p,share=much", "d:share is a number; got 'much'"),
        ("d:path=p,sampled=maybe", "d:sampled is true or false; got 'maybe'"),
        ("d:path=p,expand=1-x", "d:expand is integers joined by '-'.*got '1-x'"),
        ("d:depth=3", "d needs the option 'path'"),
    ],
)
def test_bad_option_is_refused_by_name(text, message):
    with pytest.raises(ConfigError, match=message):
        build_options(Options, ComponentSpec.parse(text))


def test_unknown_option_suggests_the_nearest():
    with pytest.raises(UnknownNameError, match="unknown option of d 'dept'") as caught:
        build_options(Options, ComponentSpec.parse("d:path=p,dept=3"))
    assert caught.value.hint == "did you mean 'depth'?"
