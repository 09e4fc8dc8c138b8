"""TrimR: a chain that has agreed with itself is told to conclude, one that finds no end is closed."""

import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import tiny
from thrifty import assets
from thrifty.contracts import END_OF_THOUGHT, Budget, Problem, ThriftyError
from thrifty.engines.local import LocalEngine
from thrifty.engines.runner import Runner
from thrifty.engines.scripted import ScriptedEngine
from thrifty.models.load import load
from thrifty.solve.search.trimr import CLAIM, TrimR

torch.set_num_threads(1)
PROBLEM = Problem("p", "7 + 3 ?", "10")
LONG = " ".join(["more"] * 300)
FAST = TrimR(markers=("Wait",), interval=400, mild="Final", forced="Enough ")


def engine(*pieces, size=64):
    """Writes one piece per turn, then an answer; verifies by looking for the number behind "so"."""

    def script(prompt, key):
        turn = key[2]
        return pieces[turn] if turn < len(pieces) else "that </think> 10"

    def score(prompt, reply):
        def value(label):
            words = prompt.partition(f"{label}: ")[2].partition("\n")[0].split()
            return words[words.index("so") + 1] if "so" in words else ""

        same = "Second result" in prompt
        yes = value("First result") == value("Second result") if same else value("Reasoning") != ""
        return 0.0 if yes == (reply == "Yes") else -1.0

    return ScriptedEngine(script, score, batch_size=size)


def solve(method, *pieces, size=64, budget=None):
    ran = engine(*pieces, size=size)
    [outcome] = Runner(ran, budget=budget).solve(method, [PROBLEM])
    return outcome, ran


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"interval": 0}, "trimr:interval is 0: give at least 1"),
        ({"sentences": 0}, "trimr:sentences is 0"),
        ({"markers": ()}, "trimr:markers is ()"),
        ({"replies": ("Yes",)}, "trimr:replies is ('Yes',)"),
        ({"answer": "("}, "answer is a pattern"),
        ({"asks_answer": "{foo}"}, "{question} and {text} stand in asks_answer"),
    ],
)
def test_settings_with_which_no_chain_would_end_or_be_judged_are_refused(changes, told):
    with pytest.raises(ThriftyError, match=re.escape(told)):
        solve(replace(FAST, **changes), "so 10")


AGREES = ("so 10 Wait", "or so 10 Wait", "yes so 10 Wait", LONG)


@pytest.mark.parametrize("size", [1, 64])
def test_three_answers_alike_end_the_thinking(size):
    outcome, ran = solve(FAST, *AGREES, size=size)
    assert outcome.chosen.thought == "so 10 Wait or so 10 Wait yes so 10 Final that", "the last marker is taken back"
    assert outcome.chosen.response == "10"
    assert ran.generated < 80, "the piece written meanwhile was not stopped"
    assert outcome.usage.generated - outcome.usage.injected == ran.generated
    assert outcome.usage.prompt > 30, "what the verifier read counts as prompt"


def test_another_answer_or_none_begins_the_count_anew():
    pieces = ("so 10 Wait", "so 10 Wait", "so 9 Wait", "so 10 Wait", "hm Wait", "so 10 Wait", "done </think> 10")
    outcome, _ = solve(FAST, *pieces)
    assert "Final" not in outcome.chosen.thought, "10 10 9 10 - 10: never three in a row"
    again, _ = solve(FAST, *pieces[:4], "hm Wait", "so 10 Wait", "so 10 Wait", LONG)
    assert again.chosen.thought.endswith("hm Wait so 10 Wait so 10 Final that"), "one without an answer is passed over"


def test_agreements_is_how_many_repetitions_it_takes():
    outcome, _ = solve(replace(FAST, agreements=1), *AGREES[:2], LONG)
    assert outcome.chosen.thought == "so 10 Wait or so 10 Final that"


def test_a_pattern_does_what_the_verifier_does():
    for pieces in (AGREES, ("so 10 Wait", "so 9 Wait", "so 9 Wait", "hm Wait", "so 9 Wait", LONG)):
        read, _ = solve(replace(FAST, answer=r"so (\d+)"), *pieces)
        asked, _ = solve(FAST, *pieces)
        assert (read.chosen.thought, read.chosen.response) == (asked.chosen.thought, asked.chosen.response)
        assert read.usage.prompt < asked.usage.prompt


def test_a_chain_that_finds_no_end_is_closed():
    unsure = [f"so {i} Wait" for i in range(30)]
    outcome, _ = solve(replace(FAST, most=4), *unsure)
    assert outcome.chosen.thought == "so 0 Wait so 1 Wait so 2 Wait so 3 Wait Enough"
    assert outcome.chosen.closed
    outcome, _ = solve(replace(FAST, budget=20, share=0.5), *unsure)
    assert outcome.chosen.thought.count("Wait") == 4, "half of 20 tokens are spent after the fourth"


def test_a_loop_is_closed():
    method = replace(FAST, interval=50, repeat_tokens=8, repeat_times=3)
    outcome, _ = solve(method, "a b c d e f g h i j " * 6)
    assert "Enough" in outcome.chosen.thought
    outcome, _ = solve(method, " ".join(map(str, range(60))))
    assert "Enough" not in outcome.chosen.thought
    assert not method._loops(np.zeros(23, np.int32)), "23 tokens hold 8 in a row twice"
    assert method._loops(np.zeros(24, np.int32))


def test_a_solution_written_again_is_a_loop_only_where_the_window_is_shorter():
    solution = np.arange(40)
    assert TrimR(repeat_tokens=32)._loops(np.tile(solution, 3)), "its first 32 tokens have come three times"
    longer = TrimR(repeat_tokens=128)
    assert not longer._loops(np.tile(solution, 11)), "128 tokens at 0, 160 and 320 take 448, and there are 440"
    assert longer._loops(np.tile(solution, 12)), "but going on and on is one all the same"


def test_what_concludes_a_chain_of_the_claim_are_the_tokens_that_its_student_writes():
    chat = load(str(assets.find("tail-0"))).chat
    encode = partial(chat.tokenizer.encode, add_special_tokens=False)
    mild = str(CLAIM["settings"]["mild"]).replace(END_OF_THOUGHT, chat.close)
    assert encode(mild) == [*encode(" ."), chat.close_id], "no space before the closing tag, as in a chain of its own"


def test_chains_without_markers_are_left_alone():
    outcome, ran = solve(FAST, "so 10 </think>", "10")
    assert (outcome.chosen.thought, outcome.chosen.response) == ("so 10", "10")
    assert ran.generated == 4


@pytest.mark.parametrize("tokens", [1, 5, 9, 40])
def test_the_budget_is_kept(tokens):
    outcome, _ = solve(FAST, *AGREES, budget=Budget(tokens=tokens))
    assert outcome.usage.generated <= tokens


def test_on_a_model_results_are_the_same_whatever_the_batch():
    loaded = replace(tiny.loaded(template="prefilled"), eos=frozenset())
    problems = [Problem(f"p{i}", f"what is {i}", "1") for i in range(4)]
    markers = tuple(map(chr, range(97, 123)))
    method = TrimR(markers=markers, answer=r"^", interval=9, most=9, temperature=1.0, mild="=F=", forced="!")
    runs = [Runner(LocalEngine(loaded, batch_size=size, max_tokens=40)).solve(method, problems) for size in (1, 16)]
    for one, other in zip(*runs):
        assert one.chosen.ids.tolist() == other.chosen.ids.tolist()
    texts = [loaded.chat.decode(o.chosen.ids.tolist()) for o in runs[0]]
    concluded = [text for text in texts if "=F=" in text]
    assert concluded
    assert all(text.partition("=F=")[0][-1:] not in markers for text in concluded)


def test_a_marker_of_several_tokens_is_taken_back():
    loaded = replace(tiny.loaded(template="prefilled"), eos=frozenset())
    plain = Runner(LocalEngine(loaded, max_tokens=60)).solve(TrimR(markers=("\0",), interval=60, temperature=0.0),
                                                              [PROBLEM])[0].chosen  # fmt: skip
    text = loaded.chat.decode(plain.ids.tolist())
    marker = next(text[i : i + 2] for i in range(3, 40) if text[i : i + 2].isascii() and text[i : i + 2].strip(" \n"))
    method = TrimR(markers=(marker,), answer=r"^", agreements=1, interval=60, temperature=0.0, mild="=F=", most=2)
    [outcome] = Runner(LocalEngine(loaded, max_tokens=120)).solve(method, [PROBLEM])
    found = loaded.chat.decode(outcome.chosen.ids.tolist())
    assert marker in found or "=F=" not in found
