"""``thrifty reproduce``: run a method's registered claim, or its controls, and append what came of it."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from thrifty import evidence, registry
from thrifty.commands import _options
from thrifty.contracts import ThriftyError
from thrifty.engines import spread

_Done = tuple[registry.Method, dict[str, Any] | None, Exception | None]


@click.command()
@click.argument("key", required=False)
@click.option("--all", "everything", is_flag=True, help="Every claim that has no verdict for its code as it is now.")
@click.option("--scale", type=click.Choice(evidence.SCALES), default="tiny", help="smoke gives no verdict.")
@click.option("--control", type=click.Choice(evidence.CONTROLS), help="Put this in the method's place.")
@click.option(
    "--repeat",
    default=1,
    type=click.IntRange(1),
    help="Runs of --control aa, each of another stream against the last; what is done already is not run again.",
)
@click.option("--dev", is_flag=True, help="On development problems: to try a claim out. Never counts.")
@click.option(
    "--cache", default="runs/claims", type=click.Path(path_type=Path), help="Finished work is read from here."
)
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Where results stand.  [default: with the package; for your own methods ./results]",
)
@click.option("--plan", is_flag=True, help="Say what is left to run, and how long it took the last time; run nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the records.")
@click.option(
    "--workers",
    default=1,
    type=click.IntRange(1),
    help="Processes, each on its share of the cores: with --all for claims, of one claim for its tuning and units.",
)
@_options.ray("claims (with --all; of one claim its problems)")
@click.pass_context
def main(
    ctx: click.Context, key: str | None, everything: bool, scale: str, control: str | None, repeat: int, dev: bool,
    cache: Path, results: Path | None, plan: bool, as_json: bool, workers: int,
) -> None:  # fmt: skip
    """Run the claim that KEY registers: the paper's comparison in small, with intervals and a verdict.

    A verdict needs the family's controls too: a run without --control does them after it. To resume, run it again.
    """
    if (key is None) == (not everything):
        raise ThriftyError("name a method, or give --all: `thrifty reproduce short-m-at-k`, `thrifty reproduce --all`")
    if everything:
        found = [m for m in registry.methods().values() if evidence.read_claim(m.path) is not None]
    else:
        found = [registry.find(str(key))]
    which = [control] if control or dev or scale == "smoke" else [None, "placebo", "oracle"]
    runs: list[_Runs] = []
    for number, method in enumerate(found, 1):
        path = (results or evidence.results_folder(method.path)) / f"{method.key}.jsonl"
        if not plan:
            evidence.writable(path)
        if scale != "smoke" and not dev and (claim := evidence.read_claim(method.path)) is not None:
            evidence.unamended(method.path, claim, evidence.read(path))
        left = _left(method, path, "dev" if dev and scale != "smoke" else scale, which, repeat, asked=not everything)
        runs.append(_Runs(f"[{number}/{len(found)}]", method, path, left))
    if plan:
        _plan(runs, scale)
        return
    if workers > 1 and spread.executor() is not None:
        raise ThriftyError("give --workers without --ray, whose cluster has workers of its own")
    pool = ctx.with_resource(spread.processes(workers)) if workers > 1 else None
    failed = []
    if everything and (executor := spread.executor() or pool):
        done = _away(executor, runs, scale, dev, cache)
    else:
        done = _here(runs, scale, dev, cache, as_json, pool)
    for method, record, error in done:
        if record is not None:
            click.echo(json.dumps(record, indent=1, ensure_ascii=False) if as_json else told(record))
        if error is not None:
            if not everything:
                raise error
            failed.append(method.key)
            click.echo(f"thrifty: {method.key}: {error}", err=True)
    if pool is not None:
        pool.shutdown()  # all is done: workers end by themselves, where leaving the command would break them off
    if failed:
        click.echo(f"thrifty: {len(failed)} of {len(found)} claims crashed: {', '.join(failed)}", err=True)
        ctx.exit(1)


@dataclass(frozen=True, eq=False)
class _Runs:
    """The runs of a claim that are left: control and stream of each, the next one decided on once the last is kept."""

    label: str
    method: registry.Method
    path: Path
    left: Iterator[tuple[str | None, int]]


def _left(
    method: registry.Method, path: Path, scale: str, controls: Sequence[str | None], repeat: int, asked: bool
) -> Iterator[tuple[str | None, int]]:
    for control in controls:
        for stream in range(1, 1 + (repeat if control == "aa" else 1)):
            again = asked and control == controls[0] and repeat == 1
            if again or not _needless(method, path, scale, control, stream):
                yield control, stream


def _took(claim: _Runs, scale: str) -> float:
    """Seconds of the claim and its controls when its code last ran; infinity if it never did."""
    ended = [r for r in evidence.read(claim.path) if r["scale"] == scale and not r.get("error")]
    took = {r["control"]: r["seconds"] for r in ended if r["code"] == ended[-1]["code"]}
    return sum(took.get(control, 0.0) for control in (None, "placebo", "oracle")) if took else math.inf


def _plan(runs: Sequence[_Runs], scale: str) -> None:
    """Print, per claim, whether anything is left to run, and what it and its controls took when they last ran."""
    every, open_ = 0.0, 0.0
    for claim in runs:
        took, left = _took(claim, scale), next(claim.left, None) is not None
        seconds = took if math.isfinite(took) else 0.0
        every, open_ = every + seconds, open_ + seconds * left
        last = f"{seconds / 60:5.0f} min" if math.isfinite(took) else "never ran"
        click.echo(f"{claim.method.key:24} {'to run' if left else 'done':7} {last}")
    click.echo(
        f"one after the other: {every / 3600:.1f} h for all, {open_ / 3600:.1f} h for what is left and ran before"
    )


def _here(
    runs: Sequence[_Runs], scale: str, dev: bool, cache: Path, quiet: bool, pool: Executor | None
) -> Iterator[_Done]:
    """Run them one after the other, in ``pool`` if there is one; after a crash the claim's others are left out."""
    from thrifty.claims import reproduce
    from thrifty.progress import Progress

    for claim in runs:
        for control, stream in claim.left:
            click.echo(f"{claim.label} {claim.method.key} {control or ''}", err=True)
            try:
                results = claim.path.parent
                record = reproduce(claim.method, scale, control, dev, cache, results, Progress(quiet), stream, pool)
            except Exception as error:
                yield claim.method, None, error
                break
            yield claim.method, record, None


def _away(executor: Executor, runs: Sequence[_Runs], scale: str, dev: bool, cache: Path) -> Iterator[_Done]:
    """Run them as ``_here``, claims side by side, the longest first: then the last ones end at about the same time.

    Workers hand their records back: each is appended once, here.
    """
    out: dict[Future[Any], _Runs] = {}

    def next_of(claim: _Runs) -> None:
        if (step := next(claim.left, None)) is not None:
            asked = (Path.cwd(), claim.method, scale, step[0], dev, cache, step[1])
            out[executor.submit(_claim, *asked)] = claim

    for claim in sorted(runs, key=lambda one: _took(one, scale), reverse=True):
        next_of(claim)
    try:
        while out:
            for future in wait(out, return_when=FIRST_COMPLETED).done:
                claim = out.pop(future)
                try:
                    records, why = future.result()
                except Exception as error:
                    yield claim.method, None, error
                    continue
                for record in records:
                    evidence.append(claim.path, record)
                if why is None:
                    click.echo(f"{claim.label} {claim.method.key} {records[-1]['control'] or ''}", err=True)
                    yield claim.method, records[-1], None
                    next_of(claim)
                else:
                    yield claim.method, None, ThriftyError(why)
    finally:
        for future in out:
            future.cancel()


def _claim(
    folder: Path, method: registry.Method, scale: str, control: str | None, dev: bool, cache: Path, stream: int
) -> tuple[list[dict[str, Any]], str | None]:
    """In a worker: the records of a run, a crash's too, and what it crashed of. The cache is shared."""
    from thrifty.claims import reproduce
    from thrifty.progress import Progress

    why = None
    with spread.inside(folder), tempfile.TemporaryDirectory() as own:
        try:
            reproduce(method, scale, control, dev, cache, Path(own), Progress(bars=False), stream)
        except Exception as error:
            why = str(error) or type(error).__name__
        return evidence.read(Path(own) / f"{method.key}.jsonl"), why


def _needless(method: registry.Method, path: Path, scale: str, control: str | None, stream: int) -> bool:
    """Whether the record has this run already, or the verdict does not call for it."""
    from thrifty.claims import why_not

    claim = evidence.read_claim(method.path)
    runs = [r for r in evidence.read(path) if r["scale"] == scale and evidence.current(r, method.path)]
    runs = [r for r in runs if r["commit"] and not r.get("error")]
    if claim is None or any(r["control"] == control and r.get("stream", 1) == stream for r in runs):
        return True
    if control in (None, "aa"):
        return False
    verdict = next((r["verdict"] for r in runs if not r["control"]), None)
    return verdict != {"placebo": "shown", "oracle": "refuted"}.get(control, verdict) or bool(
        why_not(method, claim, control)
    )


def _open(needed: int | None) -> str:
    return "open: not on every student" if needed is None else f"open: about {needed:,}"


def told(record: dict[str, Any]) -> str:
    """A record for people."""
    lines = [f"{record['key']} · {record['scale']}" + (f" · {record['control']}" if record["control"] else "")]
    for unit, arms in enumerate(record["units"]):
        for name in arms["method"]:
            new, old = arms["method"][name], arms["comparator"][name]
            lines.append(f"  unit {unit} {name:<12} {new['mean']:10.4f} against {old['mean']:10.4f}  (n = {new['n']})")
    for part in record.get("parts", ()):
        e = part["effect"]
        lines.append(
            f"  {part['name']:<12} effect {e['value']:+.4f}  95 % [{e['low']:+.4f}, {e['high']:+.4f}]  "
            f"one-sided p {e['p']:.2g}  "
            + ("held" if part["held"] else "refuted" if part["refuted"] else _open(part["needed"]))
        )
    lines += [f"  gate {name}: {', '.join(f'{v:.3g}' for v in values)}" for name, values in record["gates"].items()]
    lines += [f"  {name}: {', '.join(f'{v:.4g}' for v in values)}" for name, values in record["notes"].items()]
    lines += [f"  {arm} tuned to {text}" for arm, text in evidence.tuned(record).items()]
    verdict = record["verdict"] or "no verdict at this scale"
    lines.append(f"  {verdict}" + (f": {record['why']}" if record.get("why") else ""))
    if record["commit"] is None and record["scale"] in ("tiny", "gpu"):
        lines.append("  not registered: commit the method's file first; this run does not count")
    return "\n".join([*lines, f"  {record['seconds']} s"])
