"""Plans: one file for the choices that a user would otherwise have to make."""

import json

import pytest

from foretoken.core.draft import DraftBudget
from foretoken.errors import ConfigError, UnknownNameError
from foretoken.planner.plan import ADAPTIVE_MAX_NODES, DEFAULT_MAX_NODES, Plan


def test_defaults():
    plan = Plan()
    assert (plan.drafters, plan.verifier, plan.max_nodes) == (("auto",), "coupled", None)
    assert plan.is_adaptive
    assert plan.node_limit == ADAPTIVE_MAX_NODES


def test_drafters_by_name_are_used_as_they_are():
    plan = Plan(drafters=("suffix",))
    assert not plan.is_adaptive
    assert plan.node_limit == DEFAULT_MAX_NODES
    assert Plan(drafters=("suffix",), adaptive=True).node_limit == ADAPTIVE_MAX_NODES
    assert Plan(max_nodes=0).node_limit == 0


def test_adaptive_is_true_false_or_nothing():
    with pytest.raises(ConfigError, match="adaptive is true, false or nothing; got 1"):
        Plan(adaptive=1)


@pytest.mark.parametrize(
    ("num_wanted", "max_depth"), [(0, 0), (1, 0), (2, 1), (6, 5), (7, 6), (500, 6), (-3, 0)]
)
def test_budget_leaves_one_token_to_the_target(num_wanted, max_depth):
    assert Plan(max_nodes=6).budget(num_wanted) == DraftBudget(max_nodes=6, max_depth=max_depth)


def test_most_steps_of_a_request_have_the_very_same_budget():
    plan = Plan(max_nodes=6)
    assert plan.budget(100) is plan.budget(99)


def test_no_nodes_is_plain_decoding():
    assert Plan(max_nodes=0).budget(100).is_empty


def test_a_file_holds_any_part_of_a_plan(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"drafters": ["prompt-lookup", "draft-model:path=x"]}))
    assert Plan.load(path) == Plan(drafters=("prompt-lookup", "draft-model:path=x"))
    path.write_text("{}")
    assert Plan.load(path) == Plan()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "holds a JSON list, not an object"),
        ("{", "is not JSON"),
        ("", "is not JSON"),
        ('{"max_nodes": -1}', "max_nodes is an integer >= 0; got -1"),
        ('{"max_nodes": 2.5}', "got 2.5"),
        ('{"max_nodes": true}', "got True"),
        ('{"max_nodes": "8"}', "got '8'"),
        ('{"drafters": []}', "at least one"),
        ('{"drafters": [1]}', "list of texts"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        Plan.load(path)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"drafters": "auto"}, "list of texts"),
        ({"drafters": None}, "list of texts"),
        ({"drafters": {"auto": 1}}, "list of texts"),
        ({"verifier": None}, "verifier is a name; got None"),
        ({"verifier": 3}, "verifier is a name; got 3"),
    ],
)
def test_values_of_another_type_are_refused(values, message):
    """A text used to be read as its letters, and null ended in a TypeError."""
    with pytest.raises(ConfigError, match=message):
        Plan.from_mapping(values)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(ConfigError, match="is not JSON"):
        Plan.load(path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        Plan.load(tmp_path / "nothing.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Plan.load(tmp_path)


def test_unknown_entries_get_the_nearest_name():
    with pytest.raises(UnknownNameError, match="plan entry 'max_node'") as caught:
        Plan.from_mapping({"max_node": 3})
    assert "'max_nodes'" in caught.value.hint
