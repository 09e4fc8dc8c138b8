"""Methods from words on a command line."""

import pytest

from thrifty import fields, registry
from thrifty.contracts import ThriftyError


def test_a_value_keeps_its_commas():
    assert fields.split("x:a=1,2,b-c=3,a-d=") == ("x", {"a": "1,2", "b_c": "3", "a_d": ""})
    assert fields.split("x") == ("x", {})


def test_a_method_is_a_part_of_another():
    made = fields.made("best-of-n:n=4,verifier=failed-step-fraction", "solve")
    assert made == registry.load("best-of-n")(n=4, verifier=registry.load("failed-step-fraction")())
    assert fields.made("best-of-n:verifier=none", "solve").verifier is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trimr:much", "'much' is no setting; write trimr:field=value"),
        ("pear", "pear is of family tune.reward and has no solve()"),
        ("best-of-n:verifier=greedy", "greedy is of family solve.search and has no rate()"),
        ("best-of-n:verifer=greedy", "no field 'verifer'"),
    ],
)
def test_what_cannot_be_made_is_told(text: str, told: str):
    with pytest.raises(ThriftyError, match=told.replace("(", r"\(").replace(")", r"\)")):
        fields.made(text, "solve")
