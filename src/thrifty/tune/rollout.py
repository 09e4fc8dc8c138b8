"""The rollout loop, readable top to bottom: problems -> samples -> rewards -> credit -> objective -> hooks -> step.

Reinforcement learning with answers that a task can check. A step samples answers with the current weights, has a
``Reward`` look at all groups of the step, a ``Credit`` say what every sampled token is worth, and makes one or several
updates. Order, learning rate and random numbers are functions of (seed, step), so a resumed run goes on with the same
curve. Accuracy, completion and length are logged side by side: a length reward that ruins accuracy stops the run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.utils import gather_object

from thrifty.contracts import (
    Credit,
    Group,
    Hook,
    Objective,
    Problem,
    Prompt,
    Reward,
    Source,
    Strategy,
    Task,
    ThriftyError,
)
from thrifty.engines import capabilities
from thrifty.engines.local import LocalEngine
from thrifty.engines.meter import Meter, scope
from thrifty.engines.runner import Runner
from thrifty.models.load import Loaded
from thrifty.models.strength import Dial
from thrifty.tune import checkpoint
from thrifty.tune.answers import Problems, Samples, check_rewards, document, figures, minibatch
from thrifty.tune.batches import Sampled
from thrifty.tune.credit import GroupRelative, check_group, token_mean
from thrifty.tune.guard import collapsed
from thrifty.tune.logprobs import document_logprobs
from thrifty.tune.objective.clipped import Clipped
from thrifty.tune.reward.right import Right
from thrifty.tune.supervised import (
    START,
    State,
    Updates,
    accelerated,
    adamw,
    adapter_name,
    batches_of,
    begin,
    laid_out,
    learning_rate,
    not_finite,
    restore,
    save_trained,
    standing,
    total,
)

FREE = ("save_every", "tokens", "batch", "window", "keep")
"""Settings that may change when a run is taken up again."""


@dataclass(frozen=True)
class Rollout(Updates):
    """Settings of the loop; a document is an answer with its prompt."""

    steps: int = 100
    """Times that answers are sampled."""
    problems: int = 16
    """Problems per step, over all processes. A source of your own sets its own."""
    samples: int = 8
    """Answers per problem: the group. A strategy of your own sets its own."""
    epochs: int = 1
    """Passes over a step's answers."""
    minibatches: int = 1
    """Updates per pass, each on a part of the answers."""
    temperature: float = 1.0
    """Of sampling, and of the probabilities that are trained."""
    max_tokens: int | None = None
    """New tokens per answer; None lets them fill the context. Evaluate under the same limit."""
    batch: int = 128
    """Answers sampled at once."""
    aggregate: Callable[[Sequence[int], int | None], list[float]] = token_mean
    """What each token of an answer counts in an update's mean: see ``tune/credit.py``."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """How the learning rate goes on after warm-up."""
    window: int = 20
    """Steps over which the guard against collapse looks; 0 turns it off."""
    keep: float = 0.5
    """It stops when accuracy or completion falls below this share of the first window's while answers get shorter."""


@dataclass(frozen=True)
class RolloutResult:
    """What a run left behind. ``lines`` is what was logged, one per step, earlier parts of a resumed run included."""

    folder: Path
    trained: Path
    """The adapter's or the model's folder."""
    lines: list[dict[str, float]]
    stopped: str | None
    """Why the guard stopped the run early; None where it ran to its end."""
    tokens: int
    """Tokens sampled."""
    seconds: float


def rollout(
    loaded: Loaded,
    task: Task,
    problems: Source | Sequence[Problem],
    settings: Rollout,
    folder: Path,
    reward: Reward | None = None,
    credit: Credit | None = None,
    objective: Objective | None = None,
    extra: Sequence[Objective] = (),
    hooks: Sequence[Hook] = (),
    strategy: Strategy | None = None,
    prompt: Callable[[Problem], Prompt] | None = None,
    meter: Meter | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> RolloutResult:
    """Train the weights of ``loaded.model`` that require gradients (a LoRA, or all) on its own graded answers.

    Default parts: shuffled problems, ``samples`` answers to each, reward ``Right``, credit ``GroupRelative``, objective
    ``Clipped``; the losses of ``extra`` objectives are added. ``strategy`` samples in another way: every trace it tried
    is trained on. A reward whose card ``needs`` log-probabilities or entropies finds them on the traces. A source gets
    the last line logged as feedback, with ``right:ID`` for each problem's share of right answers.

    ``folder`` gets ``rollout.jsonl``, ``checkpoints/`` and at the end ``adapter/`` or ``model/``, as in supervised
    training; run again with the same arguments, it resumes. Hooks are called per update. Raises ``ThriftyError`` on bad
    settings or parts, on a loss that is not finite (nothing is saved then) and on a full disk.
    """
    # ---- set up
    folder = Path(folder)
    reward, credit, objective = reward or Right(), credit or GroupRelative(), objective or Clipped()
    source: Source = problems if hasattr(problems, "next") else Problems(problems, settings.problems, settings.seed)  # type: ignore[assignment]
    _check(settings, credit, strategy)
    bare = loaded.model
    was_training = bare.training
    accelerator = accelerated(bare)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    objectives = (objective, *extra)
    parts = {name: part.to(device).train() for one in objectives for name, part in one.modules(bare).items()}
    if parts and world > 1:
        raise ThriftyError(f"objectives that train parts of their own ({', '.join(parts)}) run in one process")
    model = accelerator.prepare(bare).train()
    weights = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    weights |= {f"{at}:{name}": p for at, part in parts.items() for name, p in part.named_parameters()}
    optimizer = adamw(weights, settings, device)
    config, isolates = laid_out(bare, settings)
    own_meter = meter is None
    meter = meter if meter is not None else Meter()
    meter.watch(bare)
    engine = LocalEngine(loaded, batch_size=settings.batch, max_tokens=settings.max_tokens, meter=meter)
    # At full strength; other adapters than LoRA have none to set and are on as they stand.
    named = adapter_name(bare) if hasattr(bare, "peft_config") else ""
    runner = Runner(engine, task, adapters={named: 1.0} if named in Dial(bare).names else {})
    wants = frozenset(name for names in capabilities.needs(reward).values() for name in names)
    solver: Strategy = strategy or Samples(
        settings.samples, settings.temperature, wants & {"logprobs", "entropies"}, prompt
    )
    per_step = settings.epochs * settings.minibatches
    updates = settings.steps * per_step
    # The reference model is what training started from: no second model, only the weights that will move.
    anchored = any(getattr(one, "needs_reference", False) for one in objectives)
    # Answers without credit need not go through the model where they add nothing to the loss.
    whole = anchored or bool(extra) or type(objective) is not Clipped
    initial = {name: p.detach().clone() for name, p in weights.items()} if anchored else {}
    state = State(bare, optimizer, updates)
    begin(hooks, state, settings.seed)
    optimizer = state.optimizer
    stateful = [source, *(part for part in (reward, credit) if hasattr(part, "state_dict"))]

    # ---- resume
    fixed = {
        k: getattr(v, "__name__", str(v)) if callable(v) else v for k, v in vars(settings).items() if k not in FREE
    }
    fixed[START] = total(initial)
    kept = weights | standing(bare)
    done, feedback = 0, {}
    last = checkpoint.latest(folder / "checkpoints")
    accelerator.wait_for_everyone()
    if last is not None:
        saved = checkpoint.load(last)
        done, feedback = saved["step"], saved["feedback"]
        restore(last, saved, fixed, kept, optimizer, _Together(stateful), hooks)
    log = folder / "rollout.jsonl"
    lines = checkpoint.trim(log, done) if accelerator.is_main_process else []

    def save(step: int) -> None:
        nonlocal last
        if accelerator.is_main_process:
            everything = {
                "step": step,
                "settings": fixed,
                "feedback": feedback,
                "weights": kept,
                "optimizer": optimizer.state_dict(),
                "source": _Together(stateful).state_dict(),
                "hooks": [hook.state_dict() for hook in hooks],
            }
            last = checkpoint.save(folder / "checkpoints", step, everything)
        accelerator.wait_for_everyone()

    # ---- the loop
    stopped = collapsed(lines, settings.window, settings.keep)
    with ExitStack() as stack:
        stack.callback(lambda: bare.train(was_training))
        if own_meter:  # no hook of ours stays on a model
            stack.callback(meter.forget, bare)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        asked_to_stop = stack.enter_context(checkpoint.interrupts())
        for step in range(done, settings.steps):
            if accelerator.reduce(torch.tensor(float(stopped is not None), device=device), "sum"):
                break
            started, spent = time.perf_counter(), meter.total().flops

            # sample with the weights as they are now
            engine.reset()
            bare.eval()  # once: the engine would turn it off and on again around every token
            asked = source.next(step, feedback)
            with scope(phase="train"):
                outcomes = runner.solve(solver, asked[rank::world], seed=_draw(settings.seed, step))
            groups = [
                Group(one.problem, one.tried, [runner.grade(one.problem, trace) for trace in one.tried])
                for one in outcomes
            ]
            if world > 1:  # rewards and credit see all groups of the step, in every process
                dealt = gather_object([groups])
                groups = [dealt[i % world][i // world] for i in range(len(asked))]
            groups = [group for group in groups if group.traces]
            if not groups:
                raise ThriftyError(f"step {step + 1}: the strategy tried no answer to any of {len(asked)} problems")
            sampling = time.perf_counter() - started

            # what they earned, and what every token of them is worth
            rewards = reward.score(groups, step)
            check_rewards(groups, rewards, reward)
            worth = credit.weights(groups, rewards, step)
            rows = [
                document(trace, advantages, settings.temperature)
                for group, given in zip(groups, worth)
                for trace, advantages in zip(group.traces, given)
            ]
            live = [i for i, row in enumerate(rows) if np.any(row.mask) and (whole or row.advantages.any())]

            def measured(rows: list[Sampled] = rows, live: list[int] = live) -> Iterator[tuple[int, np.ndarray]]:
                wanted = [rows[i] for i in live]
                return zip(live, document_logprobs(bare, wanted, settings.tokens, settings.temperature))

            if anchored:
                with _standing_in(weights, initial):
                    for i, values in measured():
                        rows[i] = dataclasses.replace(rows[i], reference=values)
            if per_step > 1:
                for i, values in measured():
                    rows[i] = dataclasses.replace(rows[i], old=values)

            # one or several updates
            bare.train()
            learnt: dict[str, float] = {}
            lr = grad_norm = 0.0
            for update in range(step * per_step, (step + 1) * per_step):
                torch.manual_seed(_draw(settings.seed, update, rank))
                documents = minibatch(rows, set(live), settings, step, update % per_step)
                if len(documents) < world:
                    continue  # equal rewards in every group: there is nothing to learn from
                batches = [
                    dataclasses.replace(batch, total=1.0)
                    for batch in batches_of(documents, settings, isolates, rank, world, config)
                ]
                lr = learning_rate(settings, update, updates)
                for group_of_weights in optimizer.param_groups:
                    group_of_weights["lr"] = lr
                state.step, state.batches = update, batches
                for hook in hooks:
                    hook.before_step(state)
                loss_sum = torch.zeros((), device=device)
                logged: dict[str, float] = {}
                for i, batch in enumerate(batches):
                    batch = batch.to(device)
                    with ExitStack() as forward:
                        if i < len(batches) - 1:
                            forward.enter_context(accelerator.no_sync(model))
                        forward.enter_context(scope(phase="train", padding=batch.input_ids.numel() - batch.tokens))
                        losses, logs = zip(*(one.loss(model, batch, step, parts) for one in objectives))
                        loss = sum(losses)
                        accelerator.backward(loss * world)  # DDP takes the mean over processes, the loss is their sum
                    loss_sum += loss.detach().float()
                    for name, value in (item for one in logs for item in one.items()):
                        logged[name] = logged.get(name, 0.0) + value
                for hook in hooks:
                    hook.after_backward(state)
                norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), settings.clip or math.inf).float()
                grad_norm = float(norm)
                sums = torch.stack([loss_sum, *(loss_sum.new_tensor(value) for value in logged.values())])
                total_loss, *values = accelerator.reduce(sums, "sum").tolist()
                if not (math.isfinite(total_loss) and math.isfinite(grad_norm)):
                    raise not_finite(total_loss, grad_norm, step + 1, lr, last or folder)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                state.loss = total_loss
                for name, value in {"loss": total_loss, **dict(zip(logged, values))}.items():
                    learnt[name] = learnt.get(name, 0.0) + value / per_step  # means over the step's updates
                for hook in hooks:
                    hook.after_step(state)

            # tell
            line = {
                "step": step + 1,
                "loss": 0.0,
                **learnt,
                **figures(groups, rewards, worth),
                "lr": lr,
                "grad_norm": grad_norm,
                "sampling": sampling,
                "flops": (meter.total().flops - spent) * world,  # each process has as much to do
                "seconds": time.perf_counter() - started,
            }
            right = {f"right:{g.problem.id}": float(np.mean([grade.right for grade in g.grades])) for g in groups}
            feedback = {**line, **right}
            if accelerator.is_main_process:
                lines.append(line)
                stopped = collapsed(lines, settings.window, settings.keep)
                with checkpoint.disk(log), log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                if progress is not None:
                    progress(step + 1, settings.steps, line)
            ends = torch.tensor([float(asked_to_stop()), float(stopped is not None)], device=device)
            interrupted, over = accelerator.reduce(ends, "sum").tolist()
            due = settings.save_every and (step + 1) % settings.save_every == 0
            if interrupted or over or due or step + 1 == settings.steps:
                save(step + 1)
            if interrupted and step + 1 < settings.steps:
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1} of {settings.steps}; run the same command again to go on"
                )

    # ---- what was learnt
    trained = folder / ("adapter" if hasattr(bare, "peft_config") else "model")
    if accelerator.is_main_process:
        save_trained(bare, trained, {name: p for name, p in weights.items() if name.split(":")[0] in parts})
        if not hasattr(bare, "peft_config"):  # so that the folder can be loaded
            loaded.tokenizer.save_pretrained(trained)
    accelerator.wait_for_everyone()
    if stopped is not None:
        warnings.warn(f"stopped after step {len(lines)} of {settings.steps}: {stopped}", stacklevel=2)
    return RolloutResult(
        folder=folder,
        trained=trained,
        lines=lines,
        stopped=stopped,
        tokens=int(sum(line["tokens"] for line in lines)),
        seconds=sum(line["seconds"] for line in lines),
    )


def _check(settings: Rollout, credit: Credit, strategy: Strategy | None) -> None:
    for name in ("steps", "problems", "samples", "epochs", "minibatches", "batch", "tokens", "row"):
        if getattr(settings, name) < 1:
            raise ThriftyError(f"{name} is {getattr(settings, name)}: give at least 1")
    if not settings.lr > 0 or not settings.temperature > 0:
        raise ThriftyError(
            f"lr {settings.lr} and temperature {settings.temperature} must be above 0: answers must vary"
        )
    if strategy is None and settings.samples < getattr(credit, "least", 1):
        check_group(settings.samples, f"samples={settings.samples} with credit {type(credit).__name__}")


def _draw(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


@contextmanager
def _standing_in(weights: dict[str, Any], others: dict[str, torch.Tensor]) -> Iterator[None]:
    """Run with other values of these weights."""
    held = {name: p.data for name, p in weights.items()}
    try:
        for name, p in weights.items():
            p.data = others[name]
        yield
    finally:
        for name, p in weights.items():
            p.data = held[name]


@dataclass
class _Together:
    """The parts that have a state, saved as one."""

    parts: list[Any]

    def next(self, step: int, feedback: Any) -> Sequence[Any]:
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if len(state["parts"]) != len(self.parts):
            raise ThriftyError("the checkpoint was made with another source, reward or credit: give the same ones")
        for part, one in zip(self.parts, state["parts"]):
            part.load_state_dict(one)
