"""Results to draw a board from: claims' own judgement on made-up trials of methods that stand in the package.

``python tests/example_board.py FOLDER`` writes them for a page to look at.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from thrifty import claims, evidence, registry
from thrifty.evidence import Claim, Part

PARTS = (
    Part("tokens", "superior", better="lower", on="log ratio", smallest=0.22),
    Part("accuracy", "non-inferior", margin=0.05),
)
CLAIM = Claim(
    "It spends a fifth fewer thinking tokens and stays as accurate.", PARTS, ("search",), 120, "student", {"k": 8},
    gates={"a vote helps": [0.02, None]}, levels=(3, 4), match="generated tokens",
    text=json.dumps({
        "says": "It spends a fifth fewer thinking tokens and stays as accurate.", "tasks": ["search"], "levels": [3, 4],
        "n": 120, "unit": "student", "comparator": {"k": 8}, "match": "generated tokens", "seeds": 3,
        "gates": {"a vote helps": [0.02, None]},
        "parts": [{"name": "tokens", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.22},
                  {"name": "accuracy", "test": "non-inferior", "margin": 0.05}],
    }),
)  # fmt: skip


def record(
    key: str, saved: float = 0.3, lost: float = 0.0, gate: float = 0.1, control: str | None = None, scale: str = "tiny",
    seed: int = 0, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    """One run of ``CLAIM``: arms drawn at random, judged as ``claims.reproduce`` judges them.

    ``saved`` is the true log ratio of tokens, ``lost`` the true loss of accuracy.
    """
    return json.loads(_record(key, saved, lost, gate, control, scale, seed)) | more


@cache
def _record(key: str, saved: float, lost: float, gate: float, control: str | None, scale: str, seed: int) -> str:
    built = registry.methods().get(key)
    rng = np.random.default_rng([seed, *key.encode(), *(control or "").encode()])
    effects: dict[str, list[Any]] = {p.name: [] for p in PARTS}
    strata, units = [], []
    for _ in range(CLAIM.seeds):
        levels = np.array([f"search/{3 + i % 2}" for i in range(CLAIM.n)])
        tokens = rng.lognormal(4.2, 0.3, CLAIM.n)
        old: dict[str, Any] = {"tokens": tokens, "accuracy": (rng.random(CLAIM.n) < 0.75) * 1.0, "strata": levels}
        right = np.where(rng.random(CLAIM.n) < 2 * lost, 0.0, old["accuracy"])
        new = {"tokens": tokens * np.exp(rng.normal(-saved, 0.2, CLAIM.n)), "accuracy": right, "strata": levels}
        for part in PARTS:
            effects[part.name].append(claims._gap(part, new[part.name], old[part.name]))
        strata.append(levels)
        units.append({arm: claims._summary(CLAIM, got) for arm, got in (("method", new), ("comparator", old))})
    gates = {"a vote helps": [gate] * CLAIM.seeds}
    parts = [claims.judge(p, CLAIM.unit, effects[p.name], strata) for p in PARTS]
    verdict, why = claims.decide(CLAIM, parts, gates)
    made = {
        "key": key,
        "scale": scale,
        "control": control,
        "controls": ["placebo"],
        "time": f"2026-11-{20 + seed % 9:02}T0{seed % 7}:12:00Z",
        "claim": evidence.digest(CLAIM.text),
        "code": evidence.code_hash(built.path) if built else "c0de",
        "source": evidence.source_hash(built.path) if built else "50u2ce",
        "lab": "1ab",
        "commit": "0123456789ab" if scale in ("tiny", "gpu") else None,
        "settings": {"method": {"m": 3}, "comparator": {"k": 8}},
        "registered": json.loads(CLAIM.text),
        "units": units,
        "gates": gates,
        "figures": {
            arm: [
                {
                    "thought_tokens": u[arm]["tokens"]["mean"],
                    "accuracy": u[arm]["accuracy"]["mean"],
                    "trained_parameters": trained,
                }
                for u in units
            ]
            for arm, trained in (("method", 1e4 * (1 + seed % 5)), ("comparator", 7e5))
        },
        "notes": {"method: odd": [1.0] * 3},
        "picks": {"method": {"lr": 0.01}, "comparator": {"lr": 0.003}},
        "tuning": {"comparator": [[{"lr": 0.003}, 0.5], [{"lr": 0.01}, 0.25]]},
        "verdict": verdict if scale in ("tiny", "gpu", "dev") else None,
        "why": why,
        "parts": [{**vars(p), "effect": {**vars(p.effect), "units": list(p.effect.units)}} for p in parts],
        "seconds": 61.5 + seed,
    }
    return json.dumps(made)


def crash(key: str, **more: Any) -> dict[str, Any]:
    """A run that came to no end."""
    kept = (
        "key",
        "scale",
        "control",
        "controls",
        "time",
        "claim",
        "code",
        "source",
        "lab",
        "commit",
        "settings",
        "seconds",
    )
    row = record(key)
    return {name: row[name] for name in kept} | {"error": "ThriftyError: the bank has 50 problems of 120", **more}


def example_results(folder: Path) -> Path:
    """Every kind of standing, over the methods that are built."""
    keys = [e.key for e in registry.entries(plugins=False) if e.where and e.where.stem.replace("_", "-") == e.key]
    kinds = [(0.5, 0.0, 0.1), (0.02, 0.0, 0.1), (0.25, 0.06, 0.1), (0.35, 0.3, 0.1), (0.4, 0.0, 0.0), (0.3, 0.01, 0.1)]
    for i, key in enumerate(keys):
        saved, lost, gate = kinds[i % len(kinds)]
        path = folder / f"{key}.jsonl"
        if i % 7 == 3:
            evidence.append(path, crash(key))
        if i % 9 == 8:
            evidence.append(path, record(key, saved, lost, scale="dev", seed=i))
            continue
        evidence.append(path, record(key, saved, lost, gate, seed=i))
        evidence.append(path, record(key, 0.0, 0.1, gate, control="placebo", seed=i))
    return folder


if __name__ == "__main__":
    example_results(Path(sys.argv[1]))
