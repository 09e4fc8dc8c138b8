"""Broken as methods, whatever the family: fields, constructors, hidden state."""

import random
from dataclasses import dataclass, field, replace

from mutants import caught, template

FAMILY = "traces.compress"
Sound = template(FAMILY)


@caught(FAMILY, "is a frozen dataclass", "not frozen")
@dataclass
class Mutable:
    share: float = field(default=0.5, metadata={"help": "kept"})

    def compress(self, chains, ctx):
        return list(chains)


@caught(FAMILY, "fields have a default and a help text", "share has no help text")
@dataclass(frozen=True)
class Unexplained(Sound):
    share: float = 0.5


@caught(FAMILY, "fields have a default and a help text", "share has no default")
@dataclass(frozen=True, kw_only=True)
class Demanding(Sound):
    share: float = field(metadata={"help": "kept"})


@caught(FAMILY, "its constructor only stores", "__post_init__ does more than store")
@dataclass(frozen=True)
class Busy(Sound):
    def __post_init__(self):
        object.__setattr__(self, "most", self.most * 2)


@caught(FAMILY, "its constructor only stores", "__init__ does more than store")
@dataclass(frozen=True)
class Constructs(Sound):
    def __init__(self, most: int = 4000):
        object.__setattr__(self, "most", most)
        object.__setattr__(self, "words", sorted(dir(random)))


class _Prepares:
    def __post_init__(self):
        object.__setattr__(self, "words", sorted(dir(random)))


@caught(FAMILY, "its constructor only stores", "__post_init__ does more than store")
@dataclass(frozen=True)
class InheritsItsWork(_Prepares, Sound):
    pass


@caught(
    FAMILY, "has the verb of its family", "has no compress (it has select); what it has is the verb of traces.select"
)
@dataclass(frozen=True)
class SelectsInstead:
    def select(self, chains, ctx):
        return [0]


@caught(FAMILY, "has the verb of its family", "compress(chains: Sequence[Chain], ctx: Context) -> list[Chain | None]")
@dataclass(frozen=True)
class TakesNoContext(Sound):
    def compress(self, chains):
        return list(chains)


@caught(FAMILY, "has the verb of its family", "has compress(ctx, chains): arguments are given by their place")
@dataclass(frozen=True)
class TurnsItsArgumentsRound(Sound):
    def compress(self, ctx, chains):
        return list(chains)


@caught(FAMILY, "its settings survive json", "has no name to write down")
@dataclass(frozen=True)
class Lambda(Sound):
    size: object = field(default=lambda text: len(text), metadata={"help": "of a chain"})


@caught(FAMILY, "its settings survive json", "which JSON cannot hold")
@dataclass(frozen=True)
class Listed(Sound):
    words: list = field(default_factory=lambda: ["wait"], metadata={"help": "dropped"})


@caught(FAMILY, "gives the same result every time", "called twice")
@dataclass(frozen=True)
class Dice(Sound):
    def compress(self, chains, ctx):
        return [replace(chain, thought=chain.thought[: random.randrange(9)]) for chain in chains]


@caught(FAMILY, "gives the same result every time", "called twice")
@dataclass(frozen=True)
class Remembers(Sound):
    seen: list = field(default_factory=list, metadata={"help": "chains"}, compare=False)

    def compress(self, chains, ctx):
        self.seen.extend(chains)
        return [replace(chain, thought=chain.thought[: len(self.seen)]) for chain in chains]


@caught(FAMILY, "leaves its inputs alone", "what it was given is not what it was")
@dataclass(frozen=True)
class Sorts(Sound):
    def compress(self, chains, ctx):
        out = list(chains)
        chains.sort(key=lambda chain: len(chain.thought))
        return out
