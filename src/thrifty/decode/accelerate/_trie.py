"""A memory of token sequences that proposes how a text may go on: the trie of Lookahead (arXiv 2312.12728, section 4).

Counts are kept per node: how often outputs passed it, and how often the prompt of each row under way did. A prompt is
forgotten with its row; outputs stay, and fade.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


class _Node:
    """What was seen after one sequence of tokens."""

    __slots__ = ("children", "output", "prompts")

    def __init__(self) -> None:
        self.children: dict[int, _Node] = {}
        self.output = 0.0
        self.prompts: dict[int, int] = {}

    def seen(self, row: int) -> bool:
        return self.output > 0 or row in self.prompts


@dataclass
class Draft:
    """A tree of proposed tokens below the last one of a text; ``parents[i]`` < i, -1 for a first token."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int) -> int:
        self.tokens.append(token)
        self.parents.append(parent)
        return len(self.tokens) - 1

    def depths(self) -> list[int]:
        """1 for a first token, and so on."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return depths

    def paths(self) -> list[list[int]]:
        """From a first token to each leaf, as indices, in order of the leaves."""
        inner = set(self.parents)
        found = []
        for leaf in (i for i in range(len(self)) if i not in inner):
            path = [leaf]
            while self.parents[path[-1]] >= 0:
                path.append(self.parents[path[-1]])
            found.append(path[::-1])
        return found


class Trie:
    """Sequences of up to ``length`` tokens by their first token.

    A first token keeps at most about ``capacity`` nodes of outputs: beyond that, counts are halved and what was seen
    once is dropped.
    """

    def __init__(self, length: int = 14, capacity: int = 512) -> None:
        self.length, self.capacity = length, capacity
        self.top = _Node()
        self.sizes: dict[int, int] = {}
        """Nodes of outputs by first token."""
        self._rows = 0
        self._read: dict[int, list[tuple[dict[int, _Node], int, _Node]]] = {}

    def open(self, prompt: Sequence[int]) -> int:
        """Read a prompt that is under way; its row's number."""
        self._rows += 1
        row = self._rows
        self._read[row] = passed = []
        for start in range(len(prompt) - 1):
            level = self.top.children
            for token in prompt[start : start + self.length]:
                node = level.setdefault(token, _Node())
                node.prompts[row] = node.prompts.get(row, 0) + 1
                passed.append((level, token, node))
                level = node.children
        return row

    def shut(self, row: int) -> None:
        """Forget a row's prompt."""
        for level, token, node in reversed(self._read.pop(row)):
            node.prompts.pop(row, None)
            if not node.output and not node.prompts and not node.children and level.get(token) is node:
                del level[token]

    def note(self, tokens: Sequence[int]) -> None:
        """Count one sequence of an output, at most ``length`` tokens of it."""
        level = self.top.children
        for token in tokens[: self.length]:
            node = level.setdefault(token, _Node())
            if not node.output:
                self.sizes[tokens[0]] = self.sizes.get(tokens[0], 0) + 1
            node.output += 1
            level = node.children
        if self.sizes.get(tokens[0], 0) > self.capacity:
            self.sizes[tokens[0]] = 1 + _fade(self.top.children[tokens[0]].children)

    def draft(self, tail: Sequence[int], row: int, depth: int, nodes: int, weight: float) -> Draft:
        """At most ``nodes`` tokens, ``depth`` deep, that followed the last tokens of a text.

        The longest end of ``tail`` that was seen counts, unless fewer tokens followed it than are wanted: then a
        shorter one. Nodes are ranked by (1 - weight) * prompt count + weight * output count; half of them at least by
        output count alone, where there are as many. An empty ``tail`` finds what was seen most, whatever the text.
        """
        found = Draft()
        for start in range(len(tail) or 1):
            top = self._find(tail[start:], row)
            if top is None:
                continue
            chosen = {id(node) for node, _, _ in itertools.islice(_ranked(top, depth, row, 1.0), max(1, nodes // 2))}
            for node, _, _ in _ranked(top, depth, row, weight):
                if len(chosen) >= nodes:
                    break
                chosen.add(id(node))
            found, at = Draft(), {id(top): -1}
            for node, token, parent in _ranked(top, depth, row, weight, chosen):
                at[id(node)] = found.add(token, at[id(parent)])
            if len(found) >= min(depth, nodes):
                break
        return found

    def _find(self, tokens: Sequence[int], row: int) -> _Node | None:
        node = self.top
        for token in tokens:
            below = node.children.get(token)
            if below is None or not below.seen(row):
                return None
            node = below
        return node


def _ranked(
    top: _Node, depth: int, row: int, weight: float, among: set[int] | None = None
) -> Iterator[tuple[_Node, int, _Node]]:
    """Nodes below ``top`` with their tokens and parents, best first, parents before their children.

    A child never ranks above its parent, so the best of those within reach is the best of all that are left. Among
    equals the deeper goes first: one whole branch is worth more than the beginnings of several. ``among`` are the ids
    of the nodes that count.
    """
    heap: list[tuple[float, int, int, int, _Node, _Node]] = []
    order = itertools.count()

    def push(parent: _Node, level: int) -> None:
        for token, node in parent.children.items():
            rank = (1 - weight) * node.prompts.get(row, 0) + weight * node.output
            if rank > 0 if among is None else id(node) in among:
                heapq.heappush(heap, (-rank, -level, next(order), token, node, parent))

    push(top, 1)
    while heap:
        _, level, _, token, node, parent = heapq.heappop(heap)
        yield node, token, parent
        if -level < depth:
            push(node, 1 - level)


def _fade(level: dict[int, _Node]) -> int:
    """Halve output counts, drop what was seen once and no prompt under way uses; how many nodes of outputs are left."""
    left = 0
    for token, node in list(level.items()):
        node.output = node.output / 2 if node.output > 1 else 0.0
        left += _fade(node.children) + (node.output > 0)
        if not node.output and not node.prompts:
            del level[token]
    return left
