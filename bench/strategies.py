"""short-3@8 against majority@8 and a single pass: wall seconds, tokens, and the paper's cost formula.

    .venv/bin/python bench/strategies.py [--model long] [--task roll] [--n 200] [--rounds 3]

Interleaved A B C A B C in one process; seconds are the median round's. "formula" is the sum over problems of
short-m@k's cost (arXiv 2505.17813, section 3) worked out from the lengths that majority@8 sampled with the same random
streams; "metered" is what the engine's meter counted.
"""

from __future__ import annotations

import argparse
import statistics
import time

from thrifty import tasks
from thrifty.engines.local import LocalEngine
from thrifty.engines.runner import Runner
from thrifty.models.load import load
from thrifty.solve.search.self_consistency import SelfConsistency
from thrifty.solve.search.short_m_at_k import ShortMAtK, cost
from thrifty.solve.search.single_pass import SinglePass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="long")
    parser.add_argument("--task", default="roll")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=128)
    arguments = parser.parse_args()
    loaded, task = load(arguments.model), tasks.load(arguments.task)
    problems = task.problems("test", arguments.n)
    arms = {"single pass": SinglePass(), "majority@8": SelfConsistency(k=8), "short-3@8": ShortMAtK(m=3, k=8)}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    outcomes, metered = {}, {}
    for _ in range(arguments.rounds):
        for name, strategy in arms.items():
            engine = LocalEngine(loaded, batch_size=arguments.batch_size, max_tokens=512)
            started = time.perf_counter()
            outcomes[name] = Runner(engine, task).solve(strategy, problems)
            seconds[name].append(time.perf_counter() - started)
            total = engine.meter.total()
            metered[name] = total.thought + total.answer + total.injected
    print("strategy     accuracy  thinking  of which cancelled   metered  seconds  vs single")
    base = sum(o.usage.generated for o in outcomes["single pass"])
    for name, run in outcomes.items():
        right = statistics.mean(o.grade.right for o in run)
        thought, gone = sum(o.usage.thought for o in run), sum(o.usage.discarded for o in run)
        made = sum(o.usage.generated for o in run)
        print(
            f"{name:<12} {right:8.3f} {thought / len(run):9.1f} {gone / len(run):19.1f} "
            f"{metered[name] / len(run):9.1f} {statistics.median(seconds[name]):8.2f} {made / base:9.2f}x"
        )
    predicted = sum(cost([t.usage.thought for t in o.tried], 3) for o in outcomes["majority@8"])
    measured = sum(o.usage.thought for o in outcomes["short-3@8"])
    print(f"short-3@8 thinking tokens: formula {predicted}, metered {measured}, ratio {measured / predicted:.3f}")
    saved = statistics.median(seconds["short-3@8"]) / statistics.median(seconds["majority@8"])
    print(f"short-3@8 takes {saved:.2f} of majority@8's wall time")


if __name__ == "__main__":
    main()
