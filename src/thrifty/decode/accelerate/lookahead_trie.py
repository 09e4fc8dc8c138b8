"""Drafts from a trie of prompts and past outputs, checked as a tree in one forward: the same tokens in fewer forwards.

No draft model. Every sequence of ``branch_length`` tokens that prompts or outputs held is remembered. The last two
tokens of a text are looked up (only the last one where that finds too little), what followed them is ranked by

    (1 - w) * count in this row's prompt + w * count in outputs,        w = 1e-4,

and the best ``nodes`` of it, a tree, go through the model at once: a node sees the context and its ancestors and
stands at position context + depth. From the root, the child that equals the model's own token is followed (its greedy
token, or the one that the row's random number for that position draws); the first miss gives the model's own token.
So a forward yields 1 + accepted tokens, at worst one, and the text is that of plain decoding.

>>> memory = Trie()
>>> for output in ([1, 2, 3], [1, 2, 3], [1, 4]): memory.note(output)
>>> row = memory.open([5, 1, 4, 6])  # after 1, its prompt has 4 once (0.9999 + 1e-4), outputs have 2 twice (2e-4)
>>> draft = memory.draft([8, 1], row, depth=2, nodes=3, weight=1e-4)  # 8 was never seen: what followed 1
>>> draft.tokens, draft.parents  # 4 and, below it, 6 of the prompt; half the nodes were kept for outputs: 2
([4, 6, 2], [-1, 0, -1])
>>> tokens_per_forward(accepted=12, positions=100, prefill=40, padding=20, drafted=32)  # 8 row-forwards
2.5

Paper: Zhao et al., Lookahead: An Inference Acceleration Framework for Large Language Model with Lossless Generation
Accuracy (2312.12728).
Differs: every row keeps its ``nodes``, where the authors' batched code divides them among the rows; nodes of a finished
prompt go at once and a trie that is too large fades at once, where theirs wait for the end of a request; outputs are
limited per first token (512 nodes), where theirs are in all (65,536); nodes that rank alike go deepest first. Models
with a sliding window are read as if they had none. The memory is shared by all rows of one decoder, so what is drafted
depends on who ran before, the tokens do not (in fp32, up to near-ties).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from thrifty.contracts import Card, Sample
from thrifty.decode.accelerate._trie import Draft, Trie

if TYPE_CHECKING:
    from torch import Tensor

CARD = Card(
    key="lookahead-trie",
    title="Lookahead: An Inference Acceleration Framework for Large Language Model with Lossless Generation Accuracy",
    arxiv="2312.12728",
    year=2023,
    saves=("latency",),
    needs=("decoder",),
)
CLAIM = {
    "says": "A tree of branches is drafted better than one branch of as many tokens, and spares a third of forwards.",
    "parts": [
        {"name": "forwards", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.1},
        {"name": "against plain decoding", "test": "superior", "better": "lower", "on": "log ratio", "smallest": 0.405},
    ],
    "comparator": {"branches": "single", "nodes": 16, "branch_length": 16},
    "settings": {"branches": "hierarchical", "nodes": 16},
    "student": "long",
    "tasks": ["roll"],
    "n": 240,
    "seeds": 3,
    "unit": "student",
    "match": "at most 16 tokens drafted per row and forward (the one branch as deep as the memory has it), 16 rows at "
    "once, the same problems in the same order",
    "placebo": {"suffix": 0},
    "amendments": [
        "1: the one branch was cut out of a tree of 16 nodes, whose breadth shortened it to 6.9 tokens per forward on "
        "development problems, where the tree has 15.2; now it is sought in all that was seen, 16 deep: 12.5 there"
    ],
}
READ_POSITIONS = 8192
"""At most so many positions of contexts are read in one forward."""


def hierarchical(draft: Draft, nodes: int) -> Draft:
    """The tree as it is: branches share what they begin with."""
    return draft


def parallel(draft: Draft, nodes: int) -> Draft:
    """Every branch on its own, as many as fit."""
    found = Draft()
    for path in draft.paths():
        parent = -1
        for i in path[: nodes - len(found)]:
            parent = found.add(draft.tokens[i], parent)
    return found


def single(draft: Draft, nodes: int) -> Draft:
    """One branch of at most ``nodes``: from each node the child that was ranked first."""
    found, at = Draft(), -1
    for i, parent in enumerate(draft.parents):
        if parent == at and len(found) < nodes:
            found.add(draft.tokens[i], len(found) - 1)
            at = i
    return found


BRANCHES = {"hierarchical": hierarchical, "parallel": parallel, "single": single}


@dataclass(frozen=True)
class LookaheadTrie:
    branch_length: int = field(default=12, metadata={"help": "tokens drafted in a row at most (32 where texts repeat)"})
    nodes: int = field(default=64, metadata={"help": "tokens drafted per row and forward (128 where texts repeat)"})
    suffix: int = field(
        default=2, metadata={"help": "last tokens of a text that are looked up; 0 drafts what was seen most"}
    )
    output_weight: float = field(default=1e-4, metadata={"help": "w: an output's count beside the prompt's"})
    branches: Literal["hierarchical", "parallel", "single"] = field(
        default="hierarchical", metadata={"help": "hierarchical (a tree), parallel (apart) or single (one branch)"}
    )
    memory: Trie = field(
        default_factory=Trie,
        compare=False,
        metadata={"help": "what was seen; share it to keep it warm"},
    )

    def decode(
        self, rows: Sequence[Any], forward: Callable[..., Any]
    ) -> Generator[tuple[int, Sequence[int]], bool | None, None]:
        import torch

        # What is looked up and what is drafted must fit into what is kept; a memory of the user's own grows.
        self.memory.length = max(self.memory.length, self.branch_length + self.suffix)
        texts = [row.context.tolist() for row in rows]
        noted = [len(text) for text in texts]
        numbers = {i: self.memory.open(text) for i, text in enumerate(texts)}
        live = list(range(len(rows)))
        cache = _read(rows, forward)
        try:
            while live:
                read = torch.tensor([len(texts[i]) - 1 for i in live])
                drafts = [self._draft(rows[i], texts[i], numbers[i]) for i in live]
                columns = cache.get_seq_length()
                ids, positions, mask = _lay_out([texts[i][-1] for i in live], drafts, read, columns)
                drafted = sum(map(len, drafts))
                out = forward(
                    rows[0].role, live, ids=ids, cache=cache, positions=positions, mask=mask,
                    padding=ids.numel() - len(live) - drafted, drafted=drafted,
                )  # fmt: skip
                own = _own_tokens(out.logits, [rows[i] for i in live], [texts[i] for i in live], drafts)
                paths = [_accepted(draft, tokens) for draft, tokens in zip(drafts, own)]
                _keep(cache, read, paths, columns)
                left = []
                for at, i in enumerate(live):
                    new = [drafts[at].tokens[node] for node in paths[at]]
                    new.append(own[at][paths[at][-1] + 1 if paths[at] else 0])
                    new = new[: next((k + 1 for k, token in enumerate(new) if token in rows[i].eos), len(new))]
                    texts[i] += new
                    noted[i] = self._note(texts[i], noted[i], self.memory.length)
                    if not (yield i, new):
                        left.append(at)
                    else:
                        self._end(numbers.pop(i), texts[i], noted[i])
                if len(left) < len(live):
                    cache.batch_select_indices(torch.tensor(left))
                    live = [live[at] for at in left]
        finally:
            for i, number in numbers.items():
                self._end(number, texts[i], noted[i])

    def _draft(self, row: Any, text: Sequence[int], number: int) -> Draft:
        # What would stand beyond the row's limit could not be kept.
        room = row.max_tokens - (len(text) - len(row.context)) - 1
        depth = min(self.branch_length, room)
        if depth < 1 or self.nodes < 1:
            return Draft()
        # One branch is sought in all that followed: a tree of so few nodes spends them on breadth and cuts it short.
        nodes = sys.maxsize if self.branches == "single" else self.nodes
        draft = self.memory.draft(text[len(text) - self.suffix :], number, depth, nodes, self.output_weight)
        return BRANCHES[self.branches](draft, self.nodes)

    def _note(self, text: Sequence[int], start: int, least: int) -> int:
        """Remember the sequences of an output that begin at ``start`` and on and have ``least`` tokens; where it is."""
        while len(text) - start >= least:
            self.memory.note(text[start : start + self.memory.length])
            start += 1
        return start

    def _end(self, number: int, text: Sequence[int], start: int) -> None:
        self._note(text, start, 2)
        self.memory.shut(number)


def tokens_per_forward(accepted: int, positions: int, prefill: int, padding: int, drafted: int) -> float:
    """Mean tokens that a forward yields per row, from the meter's counts of a run: 1 where nothing is accepted."""
    return 1 + accepted / (positions - prefill - padding - drafted)


def _read(rows: Sequence[Any], forward: Callable[..., Any]) -> Any:
    """A cache that holds each row's context up to its last token, from column 0.

    Behind a shorter context stands padding, which no mask shows and the next tokens overwrite.
    """
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    lengths = torch.tensor([len(row.context) - 1 for row in rows])
    width = int(lengths.max())
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = torch.from_numpy(row.context[:-1].astype("int64"))
    step = max(1, READ_POSITIONS // len(rows))
    for start in range(0, width, step):
        end = min(width, start + step)
        columns = torch.arange(start, end)
        mask = (torch.arange(end) <= columns[:, None]).expand(len(rows), 1, -1, -1)
        given = int((columns < lengths[:, None]).sum())
        forward(
            rows[0].role, range(len(rows)), ids=ids[:, start:end], cache=cache, mask=mask, keep=1,
            positions=columns.expand(len(rows), -1), padding=len(rows) * len(columns) - given, prefill=given,
        )  # fmt: skip
    return cache


def _lay_out(
    roots: Sequence[int], drafts: Sequence[Draft], read: Tensor, columns: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and positions ``[B, T]`` of the last token and its draft, and who sees whom: ``[B, 1, T, columns + T]``."""
    import torch

    width = 1 + max(map(len, drafts))
    ids = torch.zeros(len(roots), width, dtype=torch.long)
    depth = torch.zeros(len(roots), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(roots), 1, 1)
    for row, (root, draft) in enumerate(zip(roots, drafts)):
        ids[row, 0] = root
        if draft:
            ids[row, 1 : len(draft) + 1] = torch.tensor(draft.tokens)
            depth[row, 1 : len(draft) + 1] = torch.tensor(draft.depths())
            for node, parent in enumerate(draft.parents, 1):
                sees[row, node] |= sees[row, parent + 1]
    context = (torch.arange(columns) < read[:, None])[:, None, :].expand(-1, width, -1)
    mask = torch.cat([context, sees], dim=-1)[:, None]
    return ids, depth + read[:, None], mask


def _own_tokens(
    logits: Tensor, rows: Sequence[Any], texts: Sequence[Sequence[int]], drafts: Sequence[Draft]
) -> list[list[int]]:
    """The token that plain decoding would write after each root and each node of its draft."""
    import torch

    from thrifty.engines import sampling

    if all(row.temperature <= 0 for row in rows):
        best = logits.argmax(-1).tolist()
        return [tokens[: len(draft) + 1] for tokens, draft in zip(best, drafts)]
    flat, uniform, temperature, top_p = [], [], [], []
    for at, (row, text, draft) in enumerate(zip(rows, texts, drafts)):
        begin = row.start + len(text) - len(row.context)
        flat.append(logits[at, : len(draft) + 1])
        uniform += [row.uniform(begin + depth) for depth in [0, *draft.depths()]]
        temperature += [row.temperature] * (len(draft) + 1)
        top_p += [row.top_p] * (len(draft) + 1)
    mass = torch.tensor(top_p, dtype=torch.float32, device=logits.device)
    heat = torch.tensor(temperature, dtype=torch.float32, device=logits.device)
    chance = torch.tensor(uniform, dtype=torch.float64, device=logits.device)
    drawn = sampling.draw(torch.cat(flat), heat, mass, chance, (mass < 1).nonzero()[:, 0]).tolist()
    own, start = [], 0
    for draft in drafts:
        own.append(drawn[start : start + len(draft) + 1])
        start += len(draft) + 1
    return own


def _accepted(draft: Draft, own: Sequence[int]) -> list[int]:
    """Nodes from the root down, as far as the draft agrees with the model; ``own[node + 1]`` follows ``node``."""
    reached = {-1: 0}
    for node, (token, parent) in enumerate(zip(draft.tokens, draft.parents)):
        if parent in reached and token == own[parent + 1]:
            reached[node] = reached[parent] + 1
    at = max(reached, key=lambda node: reached[node])  # branches that lie apart may begin alike
    path: list[int] = []
    while at >= 0:
        path.append(at)
        at = draft.parents[at]
    return path[::-1]


def _keep(cache: Any, read: Tensor, paths: Sequence[Sequence[int]], columns: int) -> None:
    """Move roots and accepted nodes from behind ``columns`` to the end of each row's context; drop the rest."""
    import torch

    source = [(row, columns + node + 1) for row, path in enumerate(paths) for node in (-1, *path)]
    target = [int(start) + k for start, path in zip(read, paths) for k in range(len(path) + 1)]
    row, column = torch.tensor(source).T
    to = torch.tensor(target)
    for layer in cache.layers:
        for values in (layer.keys, layer.values):
            values[row, :, to] = values[row, :, column]
    longest = int(max(start + len(path) + 1 for start, path in zip(read, paths)))
    cache.crop(longest - cache.get_seq_length())


class _Watched:
    """A decoder that is listened to: how many forwards each context took."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.forwards: dict[bytes, list[list[int]]] = {}

    def decode(self, rows: Sequence[Any], forward: Callable[..., Any]) -> Generator[Any, Any, None]:
        counts = [[0] for _ in rows]
        for row, count in zip(rows, counts):  # kept from the start: the engine leaves when the last row has ended
            self.forwards.setdefault(row.context.tobytes(), []).append(count)
        talk, ended = self.inner.decode(rows, forward), None
        while True:
            try:
                index, new = talk.send(ended)
            except StopIteration:
                return
            counts[index][0] += 1  # a row says what it got once per forward
            ended = yield index, new


@dataclass(frozen=True)
class _Greedy:
    decoder: Any

    def solve(self, problem: Any, rng: Any) -> Any:
        [trace] = yield Sample(problem.prompt, temperature=0.0, max_tokens=256, decoder=self.decoder)
        return trace


def claim(trial: Any) -> dict[str, Any]:
    """Forwards per problem over a stream of problems, from an empty memory on."""
    from dataclasses import replace

    from thrifty.engines.runner import Runner

    problems, lab = trial.problems(), trial.lab()
    lab.batch_size = 16
    memory = Trie(trial.method.branch_length + trial.method.suffix)  # what the arm can look up and draft, no less
    watched = _Watched(replace(trial.method, memory=memory))
    outcomes = Runner(lab.engine(), lab.task).solve(_Greedy(watched), problems, trial.seed)
    trial.answered(outcomes)
    traces: list[Any] = [o.chosen for o in outcomes]
    forwards = [watched.forwards[t.prompt_ids.tobytes()].pop()[0] for t in traces]
    total = lab.meter.total()
    trial.figure("flops", total.flops / len(problems))  # drafted positions too, which no answer's usage tells
    rate = tokens_per_forward(total.accepted, total.positions, total.prefill, total.padding, total.drafted)
    trial.note("tokens per forward", rate)
    trial.note("drafted per forward", total.drafted / (total.positions - total.prefill - total.padding - total.drafted))
    half = len(traces) // 2
    for name, part in (("first half", slice(half)), ("second half", slice(half, None))):
        trial.note(f"tokens per forward, {name}", sum(len(t.ids) for t in traces[part]) / sum(forwards[part]))
    plain = forwards if trial.arm == "method" else [len(t.ids) for t in traces]
    return {"forwards": forwards, "against plain decoding": plain}
