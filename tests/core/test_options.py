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


@dataclass(frozen=True)
class Outer:
    of: tuple[ComponentSpec, ...]
    guess: tuple[ComponentSpec, ...] | None = None
    depth: int = 4


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


# -- specs inside specs ----------------------------------------------------------------------


def test_brackets_hold_an_inner_spec_together():
    spec = ComponentSpec.parse("merged:of=suffix+d(path=a+b,depth=6)+suffix:depth=2, depth=3")
    assert build_options(Outer, spec) == Outer(
        (
            ComponentSpec("suffix"),
            ComponentSpec("d", {"path": "a+b", "depth": "6"}),
            ComponentSpec("suffix", {"depth": "2"}),
        ),
        depth=3,
    )


def test_specs_nest_to_any_depth():
    text = "a:of=b(of=c(path=x(1),depth=2)+d,depth=3)+e,depth=1"
    [inner, last] = build_options(Outer, ComponentSpec.parse(text)).of
    [innermost, other] = build_options(Outer, inner).of
    assert innermost == ComponentSpec("c", {"path": "x(1)", "depth": "2"})
    assert (last, other) == (ComponentSpec("e"), ComponentSpec("d"))
    assert str(ComponentSpec.parse(text)) == text


def test_brackets_may_stand_for_the_colon():
    assert ComponentSpec.parse("d(path=a,depth=6)") == ComponentSpec.parse("d:path=a,depth=6")
    assert ComponentSpec.parse("d()") == ComponentSpec("d")
    assert ComponentSpec.parse("d:path=a(b)") == ComponentSpec("d", {"path": "a(b)"})


def test_specs_that_are_no_text_are_taken_and_printed():
    inner = ComponentSpec("d", {"path": "p", "expand": (1, 3)})
    for value in (inner, [inner], ("d(path=p,expand=1-3)",)):
        spec = ComponentSpec("a", {"of": value, "guess": ["b", inner]})
        again = build_options(Outer, ComponentSpec.parse(str(spec)))
        options = build_options(Outer, spec)
        assert str(options.of[0]) == str(again.of[0]) == "d:path=p,expand=1-3"
        assert [it.name for it in options.guess] == [it.name for it in again.guess] == ["b", "d"]


@pytest.mark.parametrize("text", ["a(b=1", "a:b=1)", "a:b=)1(", "a(b=1)c", "a(b=1)c(d=2)"])
def test_brackets_that_do_not_match_are_refused(text):
    with pytest.raises(ConfigError, match="brackets do not match") as caught:
        ComponentSpec.parse(text)
    assert "name(key=value" in caught.value.hint


@pytest.mark.parametrize("of", ["", "b+", "+b", "b(c)", "(c=1)"])
def test_malformed_inner_spec_is_refused(of):
    with pytest.raises(ConfigError):
        build_options(Outer, ComponentSpec("a", {"of": of}))
