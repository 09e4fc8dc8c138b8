"""The rows under way on one model: admitted from a queue, advanced a token a step, taken out as they end.

Row i of every array is slot i of the cache, and only the first ``len(rows)`` slots are in use: where a row ends, the
last one moves into its slot, so no forward carries a dead row.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thrifty.contracts import Finish, Sample, Tail
from thrifty.engines import sampling
from thrifty.engines.meter import Meter
from thrifty.engines.reader import Reader, ScoreRow
from thrifty.models.load import Loaded

PATIENCE = 16
"""Steps after which waiting rows are admitted however few they are."""


@dataclass(eq=False)
class Row:
    """One ``Sample`` under way. Token counts are of tokens after ``context``."""

    ticket: int
    request: Sample
    context: np.ndarray
    """Prompt, prefix and injected text, int32."""
    prompt: int
    """How many of ``context`` are the prompt."""
    injected: int
    """How many, at its end, are the request's injected text."""
    cap: int
    full: Finish
    """Why it ends at ``cap``."""
    stops: tuple[str, ...]
    stream: int
    space: Hashable
    limit: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    slot: int = -1
    read: int = 0
    cached: int = 0
    latent: int = 0
    seconds: float = 0.0
    clock: float = 0.0
    forced: deque[int] = field(default_factory=deque)
    forced_at: list[int] = field(default_factory=list)
    ending: bool = False
    states: list[Any] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Ended:
    """A row that has ended; ``ids`` int32 ``[T]`` and the float32 values ``[T]`` are of what follows the context."""

    row: Row
    finish: Finish
    ids: np.ndarray
    logprobs: np.ndarray
    entropies: np.ndarray


class Batch:
    """All rows of one role. ``size`` is how many run at once, ``prefix_bytes`` what ended rows may keep in memory."""

    def __init__(self, loaded: Loaded, role: str, meter: Meter, size: int, prefix_bytes: int) -> None:
        self.reader = Reader(loaded, role, meter, prefix_bytes)
        self.loaded, self.role, self.meter, self.size = loaded, role, meter, size
        self.device = loaded.device
        self.queue: deque[Row] = deque()
        self.scores: deque[ScoreRow] = deque()
        self.rows: list[Row] = []
        self.ended: list[Ended] = []
        self.waited = 0
        self.clock = 0.0
        self.stops: sampling.Stops | None = None
        self.is_end: np.ndarray | None = None
        self.tables: list[np.ndarray] = []
        self.table_of: dict[tuple[str, ...], int] = {}
        self._steady: dict[str, Any] | None = None
        self._make_arrays(0, 0)

    def _make_arrays(self, slots: int, width: int) -> None:
        self.lengths = np.zeros(slots, np.int64)  # tokens whose keys and values stand in the cache
        self.last = np.zeros(slots, np.int64)
        self.made = np.zeros(slots, np.int64)
        self.caps = np.zeros(slots, np.int64)
        self.offset = np.zeros(slots, np.int64)  # where the row's response stands when it starts
        self.table = np.full(slots, -1, np.int64)
        self.uniform = np.zeros((slots, sampling.BLOCK))
        self.ids = np.zeros((slots, width), np.int32)
        self.logprobs = np.zeros((slots, width), np.float32)
        self.entropies = np.zeros((slots, width), np.float32)

    _ARRAYS = ("lengths", "last", "made", "caps", "offset", "table", "uniform", "ids", "logprobs", "entropies")

    def _make_room(self, slots: int, width: int) -> None:
        if slots <= len(self.ids) and width <= self.ids.shape[1]:
            return
        old = {name: getattr(self, name) for name in self._ARRAYS}
        width = self.ids.shape[1] if width <= self.ids.shape[1] else max(64, 2 * self.ids.shape[1], width)
        self._make_arrays(max(slots, len(self.ids)), width)
        used = len(self.rows)
        for name, before in old.items():
            if before.ndim == 2:
                getattr(self, name)[:used, : before.shape[1]] = before[:used]
            else:
                getattr(self, name)[:used] = before[:used]

    @property
    def busy(self) -> bool:
        return bool(self.queue or self.scores or self.rows)

    # Rows in and out -----------------------------------------------------------------------------------

    def admit(self) -> None:
        """Move waiting rows into free slots, reading each distinct context once."""
        free = min(self.size - len(self.rows), len(self.queue))
        if free <= 0:
            return
        # A forward for a handful of rows costs as much as a step of all: wait for some more to admit, but not long.
        if self.rows and free < len(self.rows) // 8 and self.waited < PATIENCE:
            self.waited += 1
            return
        self.waited = 0
        started = time.perf_counter()
        groups: dict[tuple[Hashable, bytes], list[Row]] = {}
        taken = 0
        while self.queue and taken < free:
            row = self.queue.popleft()
            if row.cap <= 0 or (row.limit is not None and row.limit <= 0):
                none = np.zeros(0, np.float32)
                self.ended.append(Ended(row, self._why_full(row, 0), none.astype(np.int32), none, none))
                continue
            groups.setdefault((row.space, row.context.tobytes()), []).append(row)
            taken += 1
        if not taken:
            return
        first = len(self.rows)
        longest = max(len(row.context) for group in groups.values() for row in group)
        self.reader.cache.reserve(first + taken, 2 * longest, first)
        heads = self.reader.fill(first, [group[0] for group in groups.values()])
        members = [(slot, row) for slot, head in enumerate(heads, first)
                   for row in groups[head.space, head.context.tobytes()][1:]]  # fmt: skip
        self.reader.cache.copy([slot for slot, _ in members], range(first + len(heads), first + taken), longest)
        for _, row in members:
            row.cached, row.read = len(row.context) - 1, 1
        admitted = heads + [row for _, row in members]
        self._make_room(first + taken, max(len(row.context) - row.prompt for row in admitted) + 1)
        for slot, row in enumerate(admitted, first):
            self._place(slot, row)
        self._steady = None
        spent = (time.perf_counter() - started) / taken
        for row in admitted:
            row.seconds, row.clock = spent, self.clock

    def _place(self, slot: int, row: Row) -> None:
        response = row.context[row.prompt :]
        row.slot = slot
        self.rows.append(row)
        self.lengths[slot] = len(row.context) - 1
        self.last[slot] = row.context[-1]
        self.made[slot] = 0
        self.caps[slot] = row.cap if row.limit is None else min(row.cap, row.limit)
        self.offset[slot] = len(response)
        self.table[slot] = self._table(row.stops)
        self.uniform[slot] = sampling.uniforms(row.stream, len(response) // sampling.BLOCK)
        self.ids[slot, : len(response)] = response
        row.states = [control.start(self.loaded.tokenizer) for control in row.request.controls]

    def _table(self, stops: tuple[str, ...]) -> int:
        if not stops:
            return -1
        if stops not in self.table_of:
            if self.stops is None:
                self.stops = sampling.Stops(self.loaded.tokenizer, self.reader.vocabulary)
            self.table_of[stops] = len(self.tables)
            self.tables.append(self.stops.table(stops))
        return self.table_of[stops]

    def cap(self, row: Row, tokens: int) -> None:
        """End ``row`` as cancelled once it has ``tokens``; at once if it has them."""
        row.limit = tokens if row.limit is None else min(row.limit, tokens)
        if row.slot >= 0:
            self.caps[row.slot] = min(self.caps[row.slot], row.limit)
            if self.made[row.slot] >= row.limit:
                self._take_out([row.slot], ["cancelled"])

    @staticmethod
    def _why_full(row: Row, made: int) -> Finish:
        return "cancelled" if row.limit is not None and row.limit < row.cap and made >= row.limit else row.full

    def _take_out(self, slots: list[int], why: list[Finish]) -> None:
        for slot, finish in zip(slots, why):
            row = self.rows[slot]
            begin, end = self.offset[slot], self.offset[slot] + self.made[slot]
            row.seconds += self.clock - row.clock
            if self.lengths[slot] == len(row.context) - 1:
                row.read -= 1  # its first step was never run
            new = self.ids[slot, begin:end].copy()
            tokens = np.concatenate([row.context, new])[: self.lengths[slot]]
            self.reader.prefixes.add(row.space, tokens, self.reader.cache, slot, row.request.patches)
            self.ended.append(
                Ended(row, finish, new, self.logprobs[slot, begin:end].copy(), self.entropies[slot, begin:end].copy())
            )
            row.slot = -1
        left = len(self.rows) - len(slots)
        gone = set(slots)
        holes = [slot for slot in slots if slot < left]
        movers = [slot for slot in range(left, len(self.rows)) if slot not in gone]
        if movers:
            self.reader.cache.copy(movers, holes, int(self.lengths[movers].max()))
            for name in self._ARRAYS:
                array = getattr(self, name)
                array[holes] = array[movers]
            for hole, mover in zip(holes, movers):
                self.rows[hole] = self.rows[mover]
                self.rows[hole].slot = hole
        del self.rows[left:]
        self._steady = None

    # A step ----------------------------------------------------------------------------------------------

    def step(self) -> None:
        """One more token for every row; rows that end are moved to ``ended``."""
        count = len(self.rows)
        if not count:
            return
        started = time.perf_counter()
        length = int(self.lengths[:count].max()) + 1
        self.reader.cache.reserve(count, length, count)
        self._make_room(count, int((self.offset[:count] + self.made[:count]).max()) + 1)
        steady = self._steady or self._settle()
        ids = torch.from_numpy(self.last[:count, None]).to(self.device)
        positions = torch.from_numpy(self.lengths[:count, None]).to(self.device)
        logits = self.reader.forward(ids, positions, 0, length, steady)[:, 0]
        raw = logits
        halted: list[int] = []
        if steady["controlled"]:
            logits, halted = self._control(raw, steady["controlled"])
        tokens = self._draw(logits, steady)
        for slot in steady["controlled"]:
            row = self.rows[slot]
            if row.forced:
                tokens[slot] = row.forced.popleft()
                row.forced_at.append(int(self.made[slot]))
        at = (np.arange(count), self.offset[:count] + self.made[:count])
        self.ids[at] = tokens
        if steady["wanted"]:
            chances = raw.float().log_softmax(-1)
            picked = torch.from_numpy(tokens).to(self.device)[:, None]
            self.logprobs[at] = chances.gather(1, picked)[:, 0].cpu().numpy()
            self.entropies[at] = torch.special.entr(chances.exp()).sum(-1).cpu().numpy()
        self.last[:count] = tokens
        self.lengths[:count] += 1
        self.made[:count] += 1
        self.clock += (time.perf_counter() - started) / count
        for slot in halted:
            self.made[slot] -= 1  # it read its last token and wrote nothing
        if halted:
            self.meter.count(self.role, prefill=len(halted))
        self._find_ended(tokens, set(halted))

    def _settle(self) -> dict[str, Any]:
        """What stays the same from step to step while the rows do."""
        requests = [row.request for row in self.rows]
        temperature = torch.tensor([row.temperature for row in self.rows], dtype=torch.float32)
        top_p = torch.tensor([row.top_p for row in self.rows], dtype=torch.float32)
        if self.is_end is None:
            self.is_end = np.zeros(self.reader.vocabulary, bool)
            self.is_end[[i for i in self.loaded.eos if i < self.reader.vocabulary]] = True
        self._steady = self.reader.steering(requests) | {
            "temperature": temperature.to(self.device),
            "top_p": top_p.to(self.device),
            "nucleus": (top_p < 1).nonzero()[:, 0].to(self.device),
            "greedy": bool((temperature <= 0).all()),
            "controlled": [slot for slot, request in enumerate(requests) if request.controls],
            "stopped": np.array([slot for slot, row in enumerate(self.rows) if row.stops], np.int64),
            "wanted": any(request.want for request in requests),
        }
        return self._steady

    def _draw(self, logits: Tensor, steady: dict[str, Any]) -> np.ndarray:
        if steady["greedy"]:
            return logits.argmax(-1).cpu().numpy()
        count = len(self.rows)
        position = self.offset[:count] + self.made[:count]
        for slot in np.flatnonzero((position % sampling.BLOCK == 0) & (self.made[:count] > 0)):
            self.uniform[slot] = sampling.uniforms(self.rows[slot].stream, int(position[slot]) // sampling.BLOCK)
        uniform = torch.from_numpy(self.uniform[np.arange(count), position % sampling.BLOCK]).to(self.device)
        drawn = sampling.draw(logits, steady["temperature"], steady["top_p"], uniform, steady["nucleus"])
        return drawn.cpu().numpy()

    def _control(self, logits: Tensor, slots: list[int]) -> tuple[Tensor, list[int]]:
        """Let the rows' controls change ``logits``, queue forced tokens and stop rows; the slots that stop now."""
        logits = logits.clone()
        groups: dict[int, tuple[Any, list[tuple[int, int]]]] = {}
        for slot in slots:
            if not self.rows[slot].forced:
                for k, control in enumerate(self.rows[slot].request.controls):
                    groups.setdefault(id(control), (control, []))[1].append((slot, k))
        for control, members in groups.values():
            index = [slot for slot, _ in members]
            tails = [
                Tail(self.ids[i, : self.offset[i] + self.made[i]].tolist(), int(self.made[i]) + self.rows[i].injected)
                for i in index
            ]
            states = [self.rows[slot].states[k] for slot, k in members]
            changed, forced, stop, states = control.step(tails, logits[index], states)
            logits[index] = changed
            for (slot, k), tokens, ends, state in zip(members, forced, stop, states):
                row = self.rows[slot]
                row.states[k] = state
                row.forced.extend(tokens)
                row.ending = row.ending or ends
        return logits, [slot for slot in slots if self.rows[slot].ending and not self.rows[slot].forced]

    def _find_ended(self, tokens: np.ndarray, halted: set[int]) -> None:
        count = len(self.rows)
        assert self.is_end is not None
        flags = self.is_end[tokens] | (self.made[:count] >= self.caps[:count])
        assert self._steady is not None
        for slot in self._steady["stopped"]:
            flags[slot] |= self.tables[self.table[slot]][tokens[slot]]
        flags[self._steady["controlled"]] = True
        slots: list[int] = []
        why: list[Finish] = []
        for slot in map(int, np.flatnonzero(flags)):
            row, end = self.rows[slot], self.offset[slot] + self.made[slot]
            finish: Finish | None = None
            if slot in halted:
                finish = "until"
            elif self.is_end[tokens[slot]]:
                finish = "stop"
            elif (row.ending and not row.forced) or self._hit(row, slot, tokens[slot], end):
                finish = "until"
            elif self.made[slot] >= self.caps[slot]:
                finish = self._why_full(row, int(self.made[slot]))
            if finish is not None:
                slots.append(slot)
                why.append(finish)
        if slots:
            self._take_out(slots, why)

    def _hit(self, row: Row, slot: int, token: int, end: int) -> bool:
        if not row.stops or self.stops is None or not self.tables[self.table[slot]][token]:
            return False
        return self.stops.hit(row.stops, self.ids[slot, :end])

    def score(self) -> list[ScoreRow]:
        """Answer all waiting scores."""
        done: list[ScoreRow] = []
        while self.scores:
            part = [self.scores.popleft()]
            while self.scores and sum(len(row.texts) for row in part) + len(self.scores[0].texts) <= self.size:
                part.append(self.scores.popleft())
            started = time.perf_counter()
            self.reader.score(part, len(self.rows))
            for row in part:
                row.seconds = (time.perf_counter() - started) / len(part)
            done += part
        return done
