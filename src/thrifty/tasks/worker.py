"""A checker in a process of its own, so that a check that hangs or dies costs five seconds and not the run.

math-verify limits its time by signals, which don't work off the main thread and don't stop C code; here its limits are
off and the whole process is killed instead. The process is started at the first question, kept, and started again after
a kill. Questions and answers are JSON, one a line.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from thrifty.contracts import ThriftyError

SECONDS = 5.0
"""Wall time a check may take."""
START_SECONDS = 120.0
"""Wall time the process may take to import its libraries; not part of a check's time."""
MEMORY_BYTES = 4 << 30
"""Address space of the process: a power tower ends in MemoryError, not in a machine out of memory."""
_REMEDY = {"math": "math-verify", "rg": "reasoning-gym"}


class Worker:
    """One guarded process. Safe to share between threads; a forked child starts its own."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds
        self.kills = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0
        self._lines: queue.Queue[str | None] = queue.Queue()

    def ask(self, question: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
        """The reply, or ``{"error": why}`` after ``seconds`` of wall time or when the process died."""
        seconds = self.seconds if seconds is None else seconds
        with self._lock:
            self._ensure()
            assert self._process is not None
            assert self._process.stdin is not None
            # A kind's libraries are imported at its first question; that time is not the check's.
            for message, limit in (({"kind": "warm", "of": question["kind"]}, START_SECONDS), (question, seconds)):
                try:
                    self._process.stdin.write(json.dumps({**message, "seconds": limit}) + "\n")
                    self._process.stdin.flush()
                    line = self._lines.get(timeout=limit)
                except queue.Empty:
                    self.close()
                    self.kills += 1
                    return {"error": f"checker timed out after {limit:g} s"}
                except OSError:
                    line = None
                if line is None:
                    self.close()
                    self.kills += 1
                    return {"error": "checker died (too much memory, or a crash in its library)"}
                reply: dict[str, Any] = json.loads(line)
                if reply.get("missing"):
                    package = _REMEDY[question["kind"]]
                    raise ThriftyError(
                        f"{package} cannot be imported ({reply['missing']}). Install it: pip install 'thrifty[tasks]'"
                    )
            return reply

    def close(self) -> None:
        """Kill the process, if any."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()

    def _ensure(self) -> None:
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return
        self.close()
        self._owner = os.getpid()
        self._lines = queue.Queue()
        self._process = subprocess.Popen(
            # -P: a file of the user's named like a library must not be imported in its stead.
            [sys.executable, "-P", "-m", "thrifty.tasks.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            # A Ctrl-C in the terminal is for the run, which ends the worker in its own time.
            start_new_session=True,
        )
        threading.Thread(target=_read, args=(self._process, self._lines), daemon=True).start()


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    process.stdout.close()
    lines.put(None)


_shared = Worker()
_memory: dict[str, dict[str, Any]] = {}
atexit.register(_shared.close)


def ask(question: Mapping[str, Any], seconds: float | None = None) -> dict[str, Any]:
    """Ask the process's shared worker; replies (not failures) are remembered."""
    key = json.dumps(question, sort_keys=True)
    reply = _memory.get(key)
    if reply is None:
        reply = _shared.ask(question, seconds)
        if "error" not in reply:
            if len(_memory) > 20_000:
                _memory.clear()
            _memory[key] = reply
    return reply


# ------------------------------------------------------------------------------------ inside the process


def _serve() -> None:
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    try:
        import resource
        import signal

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
        timer: Any = signal.setitimer
    except (ImportError, OSError, ValueError):
        timer = None
    kinds = {"math": _math, "rg": _rg, "warm": _warm, "sleep": _sleep}
    for line in sys.stdin:
        question = json.loads(line)
        if timer:
            # Nobody kills us when our parent was killed in the middle of a check: the unhandled alarm does.
            timer(0, question["seconds"] + 2)
        try:
            reply = kinds[question["kind"]](question)
        except ImportError as error:
            reply = {"missing": str(error)}
        except (Exception, RecursionError) as error:
            reply = {"score": 0.0, "message": f"the checker failed: {type(error).__name__}: {str(error)[:200]}"}
        if timer:
            timer(0, 0)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _warm(question: Mapping[str, Any]) -> dict[str, Any]:
    if question["of"] == "math":
        import math_verify  # noqa: F401
    elif question["of"] == "rg":
        import reasoning_gym  # noqa: F401
    return {}


def _sleep(question: Mapping[str, Any]) -> dict[str, Any]:
    """What a checker that hangs looks like from outside; the tests ask for it."""
    import time

    time.sleep(question["for"])
    return {"score": 1.0}


def _math(question: Mapping[str, Any]) -> dict[str, Any]:
    from math_verify import parse, verify

    gold, answer = (
        parse(f"${question[key]}$", parsing_timeout=None, fallback_mode="no_fallback") for key in ("gold", "answer")
    )
    if not gold:
        return {"score": 0.0, "message": f"the gold answer {question['gold']!r} cannot be parsed: never scored right"}
    if not answer:
        return {"score": 0.0, "message": "the answer cannot be parsed as a formula"}
    return {"score": float(verify(gold, answer, timeout_seconds=None))}


_datasets: dict[str, Any] = {}


def _rg(question: Mapping[str, Any]) -> dict[str, Any]:
    # The entry is generated anew from its seed: it holds objects that don't survive JSON.
    from thrifty.tasks.gym import make

    key = json.dumps([question[part] for part in ("dataset", "config", "seed")], sort_keys=True)
    if key not in _datasets:
        _datasets.clear() if len(_datasets) > 50 else None
        _datasets[key] = make(question["dataset"], question["config"], question["seed"])
    dataset = _datasets[key]
    entry = dataset[question["index"]]
    return {"score": float(dataset.score_answer(question["answer"], entry))}


if __name__ == "__main__":
    _serve()
