"""Methods from words on a command line."""

import pytest

from thrifty import fields, registry
from thrifty.contracts import ThriftyError


def test_a_value_keeps_its_commas():
    assert fields.split("x:a=1,2,b-c=3,a-d=") == ("x", {"a": "1,2", "b_c": "3", "a_d": ""})
    assert fields.split("x") == ("x", {})


def test_the_number_of_samples_may_stand_behind_the_key():
    vote = registry.load("self-consistency")
    assert fields.made("majority@5", "solve") == fields.made("self-consistency@5", "solve") == vote(k=5)
    assert fields.made("short-3@8:temperature=1", "solve") == registry.load("short-m-at-k")(m=3, k=8, temperature=1.0)
    assert fields.made("best-of-n@3", "solve").n == 3


def test_a_method_is_a_part_of_another():
    made = fields.made("best-of-n:n=4,verifier=failed-step-fraction", "solve")
    assert made == registry.load("best-of-n")(n=4, verifier=registry.load("failed-step-fraction")())
    assert fields.made("best-of-n:verifier=none", "solve").verifier is None


def test_a_folder_is_no_method_unless_it_is_only_called_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ssf", "adapter"):
        (tmp_path / name).mkdir()
    assert fields.part("--adapter", "ssf", "tune.adapter", "attach") == registry.load("ssf")()
    with pytest.raises(ThriftyError, match="adapter is a folder: give the key"):
        fields.part("--adapter", "adapter", "tune.adapter", "attach")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("trimr:much", "'much' is no setting; write trimr:field=value"),
        ("pear", "pear is of family tune.reward and has no solve()"),
        ("best-of-n:verifier=greedy", "greedy is of family solve.search and has no rate()"),
        ("best-of-n:verifer=greedy", "no field 'verifer'"),
        ("single-pass:temperature=nan", "single-pass:temperature needs a number, not 'nan'"),
        ("single-pass:top_p=0", "single-pass:top_p is 0: give more than 0 and at most 1"),
        ("greedy@3", "greedy@3: the number of samples goes behind @, where a strategy has one"),
        ("self-consistency@x", "self-consistency@x: the number"),
        ("self-consistencyy@3", "Did you mean 'self-consistency'"),
    ],
)
def test_what_cannot_be_made_is_told(text: str, told: str):
    with pytest.raises(ThriftyError, match=told.replace("(", r"\(").replace(")", r"\)")):
        fields.made(text, "solve")
