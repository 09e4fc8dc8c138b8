"""The vLLM engine, offline: rows run in vLLM's own loop in this process, on its batching and prefix cache.

    VllmEngine("Qwen/Qwen3-8B", adapters={"valve": "run/adapter"}, options={"max_model_len": 16384})

Thin: prompts go in as token ids, a prefix behind them, so continuing costs what vLLM's prefix cache leaves; a strength
of an adapter is a folder of its own (``_vllm_lora``); controls act in vLLM's workers (``_vllm_controls``). Written for
vLLM 0.33 and never run on one here: docs/vllm.md says what was checked.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from thrifty.contracts import (
    END_OF_THOUGHT,
    Finish,
    Hidden,
    Prompt,
    RowFailed,
    Sample,
    Score,
    Scores,
    ThriftyError,
    Trace,
    Usage,
)
from thrifty.engines import _vllm_controls, sampling
from thrifty.engines._vllm_lora import RANKS, check_lora, export_strength
from thrifty.engines._vllm_rows import Open, Row, Scoring, build, why
from thrifty.engines.capabilities import CAPABILITIES, caps, check_row
from thrifty.models.chat import ChatFormat

SLICE = 0.02
"""Seconds that a poll works at least, where rows are under way and none ends."""
PROCESSOR = "thrifty.edges.vllm_controls:Controls"


class VllmEngine:
    """Runs ``model`` (a folder or Hub id) on vLLM. Implements ``contracts.Engine``.

    ``adapters`` are LoRA folders by name; a request's strength is exported once, below ``exports`` (default: a
    temporary folder). One LoRA per request is vLLM's limit. ``thinking_token_budget`` is vLLM's own and goes with every
    request; it needs ``reasoning_parser`` or ``reasoning_config`` among the ``options``, which are fields of vLLM's
    ``EngineArgs``. ``controls=False`` leaves our logits processor out. ``temperature`` and ``top_p`` hold where a
    request names none; ``max_tokens`` limits every response.

    Seeds are vLLM's: equal for a row's key, but continuing a row draws other numbers than running it through, and
    near-ties may depend on the batch. Tokens that a control forces count as sampled. A cancelled row is *partial*:
    vLLM may have worked on a step whose tokens nobody saw. Raises ThriftyError where vLLM is not installed, and where
    it does not take a LoRA of ``adapters``.
    """

    name = "vllm"

    def __init__(
        self,
        model: str,
        adapters: Mapping[str, str | Path] | None = None,
        seed: int = 0,
        temperature: float = 0.7,
        top_p: float = 1.0,
        max_tokens: int | None = None,
        thinking_token_budget: int | None = None,
        controls: bool = True,
        exports: str | Path | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            from vllm import EngineArgs, LLMEngine
        except ImportError as error:
            raise ThriftyError(f"vLLM cannot be imported ({error}): docs/vllm.md says how to install it") from error
        options = dict(options or {})
        if thinking_token_budget is not None and not {"reasoning_parser", "reasoning_config"} & set(options):
            raise ThriftyError(
                "vLLM ends thinking at a budget only where it knows the tags: add reasoning_parser to options, such as "
                '{"reasoning_parser": "qwen3"}'
            )
        self.seed, self.temperature, self.top_p, self.max_tokens = seed, temperature, top_p, max_tokens
        self.budget = thinking_token_budget
        self.adapters = {name: Path(folder) for name, folder in (adapters or {}).items()}
        if self.adapters:
            options = {"enable_lora": True, "max_lora_rank": self._rank(), "max_loras": 4} | options
        if controls:
            options["logits_processors"] = [*(options.get("logits_processors") or ()), PROCESSOR]
        self.capabilities = CAPABILITIES["vllm"] - (set() if controls else {"controls"})
        self.engine = LLMEngine.from_engine_args(EngineArgs(model=model, **options))
        tokenizer = self.engine.get_tokenizer()
        self.chat = ChatFormat.detect(tokenizer)
        self.context = int(self.engine.model_config.max_model_len)
        self._temporary = tempfile.TemporaryDirectory(prefix="thrifty-vllm-")
        self._exports = Path(self._temporary.name if exports is None else exports)
        self._loras: dict[tuple[str, float], Any] = {}
        self._open: dict[str, Open] = {}
        self._ended: list[tuple[int, Trace | Scores | RowFailed]] = []
        self._names = itertools.count()

    # What the runner calls -------------------------------------------------------------------------------

    def submit(self, ticket: int, request: Sample | Score | Hidden, key: tuple[Hashable, ...]) -> None:
        """Queue one row; ThriftyError where the request cannot be put to vLLM, RowFailed where vLLM refuses it."""
        if isinstance(request, Hidden):
            raise ThriftyError("vLLM hands out no hidden states here: use the local engine")
        if request.role != "main":
            raise ThriftyError(f"no model for role {request.role!r}; this engine has: main")
        prompt = self.chat.prompt_ids(request.prompt)
        prefix = [int(i) for i in request.prefix]
        if isinstance(request, Score):
            self._score(ticket, request, [*prompt, *prefix])
            return
        temperature, top_p = check_row(request, self.temperature, self.top_p)
        injected = self._ids(request.inject.replace(END_OF_THOUGHT, self.chat.close))
        context = [*prompt, *prefix, *injected]
        self._check(context, key)
        limits = [*caps(request, self.max_tokens, len(injected)), (self.context - len(context), "context")]
        cap, full = min(limits, key=lambda pair: pair[0])
        row = Row(ticket, request, prompt, prefix, injected, cap, full, time.monotonic())
        if cap <= 0:
            self._end(row, full)
            return
        params = self._params(row, key, temperature, top_p)
        self._ask(Open(row), context, params, request.adapters)
        row.sent = True

    def poll(self) -> list[tuple[int, Trace | Scores | RowFailed]]:
        """Let vLLM step for a slice of time, until a row ends; hand back all that have."""
        until = time.monotonic() + SLICE
        while self._open and not self._ended:
            for output in self.engine.step():
                self._take(output)
            if time.monotonic() >= until:
                break
        ended, self._ended = self._ended, []
        return ended

    def limit(self, ticket: int, tokens: int) -> None:
        """End the row as "cancelled" once it has ``tokens`` new tokens, injected ones included; aborts it in vLLM."""
        for name, one in list(self._open.items()):
            row = one.owner
            if isinstance(row, Row) and row.ticket == ticket:
                tokens = max(0, tokens - len(row.injected))
                row.limit = tokens if row.limit is None else min(row.limit, tokens)
                self._cut(name, row)

    def thinking(self, prompt: Prompt) -> tuple[str, str]:
        """The opening and closing tag of a chain; ("", "") for a model whose tokenizer and template name none."""
        return (self.chat.open, self.chat.close) if self.chat.declared else ("", "")

    @property
    def busy(self) -> bool:
        """Whether a row is under way, or has ended and was not handed out yet."""
        return bool(self._open or self._ended)

    # Requests --------------------------------------------------------------------------------------------

    def _params(self, row: Row, key: tuple[Hashable, ...], temperature: float, top_p: float) -> Any:
        from vllm import SamplingParams

        request = row.request
        extra = None
        if request.controls:
            row.halt = self._halt()
            size = len(row.prefix) + len(row.injected)
            steering = _vllm_controls.Steering(request.controls, size, len(row.injected), row.halt)
            extra = {_vllm_controls.ARGUMENT: _vllm_controls.write(steering)}
        return SamplingParams(
            max_tokens=row.cap,
            temperature=temperature,
            top_p=top_p,
            seed=sampling.stream(self.seed, key) % (1 << 63),
            stop=[stop.replace(END_OF_THOUGHT, self.chat.close) for stop in request.until],
            stop_token_ids=None if row.halt is None else [row.halt],
            include_stop_str_in_output=True,
            skip_special_tokens=False,  # a closing tag that is one must be seen by stop strings
            logprobs=0 if "logprobs" in request.want else None,
            thinking_token_budget=self.budget,
            extra_args=extra,
        )

    def _score(self, ticket: int, request: Score, context: list[int]) -> None:
        from vllm import SamplingParams

        texts = [self._ids(text) for text in request.continuations]
        values = [None if ids else 0.0 for ids in texts]
        scoring = Scoring(ticket, time.monotonic(), values, [len(ids) for ids in texts])
        asked = {index: [*context, *ids] for index, ids in enumerate(texts) if ids}
        for index, ids in asked.items():
            self._check(ids, ("score", index))
        for index, ids in asked.items():
            # One token is the fewest that vLLM makes; it falls out of the prefill and is not looked at.
            params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
            self._ask(Open(scoring, index), ids, params, request.adapters)
        self._scored(scoring)

    def _ask(self, one: Open, context: list[int], params: Any, adapters: Mapping[str, float]) -> None:
        name = f"thrifty-{next(self._names)}"
        lora = self._lora(adapters)
        try:
            self.engine.add_request(name, {"prompt_token_ids": context}, params, lora_request=lora)
        except ValueError as error:
            raise RowFailed(f"vLLM refused a request: {error}") from error
        self._open[name] = one

    def _lora(self, adapters: Mapping[str, float]) -> Any:
        """vLLM's request for the one adapter whose strength is not 0; exported on its first use."""
        from vllm.lora.request import LoRARequest

        given = [(name, float(strength)) for name, strength in adapters.items() if strength]
        if not given:
            return None
        if len(given) > 1:
            raise ThriftyError(f"vLLM runs one LoRA per request, not {' and '.join(n for n, _ in given)}: merge them")
        name, strength = given[0]
        if name not in self.adapters:
            have = ", ".join(self.adapters) or "none"
            raise ThriftyError(f"no adapter {name!r} (there are: {have}): give it in adapters")
        if given[0] not in self._loras:
            called = f"{name}-{strength!r}"
            path = export_strength(self.adapters[name], strength, self._exports / called)
            self._loras[given[0]] = LoRARequest(called, len(self._loras) + 1, str(path.resolve()))
        return self._loras[given[0]]

    def _rank(self) -> int:
        """The ``max_lora_rank`` that takes every adapter; ThriftyError for one that vLLM takes at none."""
        needed = 1
        for name, folder in self.adapters.items():
            report = check_lora(folder)
            if report.faults or report.needed is None:
                fault = report.faults[0]
                raise ThriftyError(f"vLLM does not take adapter {name!r} in {folder}: {fault.what}; {fault.remedy}")
            needed = max(needed, report.needed)
        return next(rank for rank in RANKS if rank >= needed)

    def _halt(self) -> int:
        """A token that no model writes, by which a row that a control stopped is known from one that ended."""
        tokenizer = self.chat.tokenizer
        free = [t for t in (tokenizer.pad_token_id, tokenizer.bos_token_id) if t not in (None, tokenizer.eos_token_id)]
        if not free:
            raise ThriftyError("controls in vLLM need a token to stop a row with, a padding or beginning token that is "
                               "not end-of-sequence: give the tokenizer a pad token")  # fmt: skip
        return int(free[0])

    def _ids(self, text: str) -> list[int]:
        return list(self.chat.tokenizer.encode(text, add_special_tokens=False)) if text else []

    def _check(self, context: Sequence[int], key: tuple[Hashable, ...]) -> None:
        if not context:
            raise ThriftyError(f"empty prompt for {key}: there is no token to start from")
        if len(context) > self.context:
            raise RowFailed(f"{key}: prompt and response so far have {len(context)} tokens, more than vLLM's "
                            f"max_model_len of {self.context}: shorten the prompt")  # fmt: skip

    # Replies ---------------------------------------------------------------------------------------------

    def _take(self, output: Any) -> None:
        one = self._open.get(output.request_id)
        if one is None:  # aborted in the meantime
            return
        if isinstance(one.owner, Scoring):
            if output.finished:
                del self._open[output.request_id]
                self._read(one.owner, one.index, output)
            return
        row, made = one.owner, output.outputs[0]
        row.ids, row.logprobs = made.token_ids, made.logprobs
        row.cached = output.num_cached_tokens or 0
        if not output.finished:
            self._cut(output.request_id, row)
            return
        del self._open[output.request_id]
        if made.finish_reason == "error":
            failed = RowFailed("vLLM failed the request", "error", build(row, self.chat, "cancelled"))
            self._ended.append((row.ticket, failed))
        elif row.limit is not None and len(row.ids) > row.limit:  # it ended in a step that went past the limit
            self._end(row, "cancelled")
        else:
            self._end(row, why(row, made.finish_reason, made.stop_reason))

    def _cut(self, name: str, row: Row) -> None:
        if row.limit is not None and len(row.ids) >= row.limit:
            del self._open[name]
            self.engine.abort_request([name])
            self._end(row, "cancelled")

    def _read(self, scoring: Scoring, index: int, output: Any) -> None:
        length, told = scoring.lengths[index], output.prompt_logprobs
        pairs = list(zip(output.prompt_token_ids, told))[-length:]
        scoring.values[index] = float(sum(chances[token].logprob for token, chances in pairs))
        cached = output.num_cached_tokens or 0
        scoring.usage += Usage(prompt=len(output.prompt_token_ids) - cached, cached=cached)
        self._scored(scoring)

    def _scored(self, scoring: Scoring) -> None:
        if None not in scoring.values:
            usage = scoring.usage + Usage(calls=1, seconds=time.monotonic() - scoring.started)
            self._ended.append((scoring.ticket, Scores(list(scoring.values), usage)))

    def _end(self, row: Row, finish: Finish) -> None:
        self._ended.append((row.ticket, build(row, self.chat, finish)))
