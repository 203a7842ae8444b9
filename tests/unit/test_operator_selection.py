"""Label selectors: what is one, which labels it names, and what a schedule's tasks inherit."""

import pytest

from task_operator.selection import check_selector, inherited, keys_of


@pytest.mark.parametrize(
    ("selector", "keys"),
    [
        ("", ()),
        ("team=a", ("team",)),
        ("team==a, tier != x", ("team", "tier")),
        ("example.com/team in (a, b-1,c.d), !old", ("example.com/team", "old")),
        ("team notin (a)", ("team",)),
        ("team", ("team",)),
        ("! team ,x=", ("team", "x")),
    ],
)
def test_a_selector_names_its_labels(selector: str, keys: tuple[str, ...]) -> None:
    assert keys_of(selector) == keys
    assert check_selector(selector) == selector


@pytest.mark.parametrize(
    "text", ["a=b,", ",", "team=a b", "team in a", "team in (a", "-a=b", "a=-b", "A/b=c", "a=b;c=d", "a in ()b"]
)
def test_what_the_api_server_would_refuse_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="is no label selector"):
        keys_of(text)


def test_what_an_object_makes_is_selected_as_it_is() -> None:
    labels = {"team": "a", "tier": "x", "app": "y"}
    assert inherited(labels, selector="team=a,!old,tier in (x,y)") == {"team": "a", "tier": "x"}
    assert inherited(labels, selector="") == {}
