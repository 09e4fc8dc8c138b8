"""The supervised loop, readable top to bottom: source -> forward -> objective -> backward -> hooks -> step.

Order, learning rate and random numbers are functions of (seed, step), so a resumed run goes on with the same loss
curve, and several processes (``accelerate launch``) each work out their own share of a step. A step's loss is one mean
over all its target tokens, however they are laid out in batches and processes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from thrifty.contracts import Hook, Objective, Source, ThriftyError
from thrifty.engines.meter import Meter, scope
from thrifty.models.strength import Dial
from thrifty.tune import checkpoint
from thrifty.tune.adapter import save_adapter
from thrifty.tune.batches import Batch, Example, Pair, Shuffled, bucketed, collate, packed, packs
from thrifty.tune.logprobs import referenced
from thrifty.tune.objective.nll import NLL

START = "sum of the starting weights"
"""A checkpoint's setting where the model as it was given is the reference: one that is half trained is another."""


@dataclass(frozen=True)
class Updates:
    """How weights are updated: what both loops' settings have."""

    tokens: int = 2048
    """Positions per forward pass: a larger step is split. Memory grows with it; small ones suit a CPU's cache."""
    layout: Literal["auto", "packed", "bucketed"] = "auto"
    """How documents lie in rows; auto packs where the model keeps packed documents apart."""
    row: int = 128
    """About how many tokens a packed row takes, or the longest document. Attention costs its square."""
    lr: float = 2e-4
    """Peak learning rate."""
    warmup: float = 0.05
    """Linear warm-up: updates when at least 1, else a share of all."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate goes on after warm-up."""
    floor: float = 0.0
    """Where it falls to, as a share of the peak."""
    weight_decay: float = 0.0
    """AdamW's, on matrices only."""
    beta1: float = 0.9
    """AdamW's first moment."""
    beta2: float = 0.999
    """AdamW's second moment."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 does not clip."""
    seed: int = 0
    """Of order, dropout and whatever else is drawn."""
    save_every: int = 0
    """Steps between checkpoints; 0 saves at the end and on Ctrl-C only."""


@dataclass(frozen=True)
class Train(Updates):
    """Settings of the loop. Give ``steps`` or ``epochs``."""

    steps: int | None = None
    """Optimiser steps."""
    epochs: float | None = None
    """Passes over the examples, where they are a list; part of a pass is fine."""
    batch_size: int = 64
    """Examples per step, over all processes. A source of your own sets its own."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind. ``losses`` is one per step, earlier parts of a resumed run included."""

    folder: Path
    trained: Path
    """The adapter's or the model's folder."""
    steps: int
    losses: list[float]
    tokens: int
    """Tokens of documents that were trained on, prompts included, padding left out."""
    seconds: float


@dataclass
class State:
    """What hooks see and may change: gradients after backward, the optimiser's groups, in ``start`` the optimiser."""

    model: Any
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    """From 0; in ``after_step`` still the step just made."""
    batches: Sequence[Batch] = ()
    loss: float = math.nan
    """Of this step, from ``after_step`` on."""


class NoHook:
    """A hook that does nothing: inherit it and override what you need."""

    def start(self, state: Any) -> None: ...

    def before_step(self, state: Any) -> None: ...

    def after_backward(self, state: Any) -> None: ...

    def after_step(self, state: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def train(
    model: Any,
    data: Source | Sequence[Example] | Sequence[Pair],
    settings: Train,
    folder: Path,
    objective: Objective | None = None,
    hooks: Sequence[Hook] = (),
    meter: Meter | None = None,
    progress: Callable[[int, int, dict[str, float]], None] | None = None,
) -> TrainResult:
    """Train the weights of ``model`` that require gradients; run again with the same arguments, it resumes.

    ``folder`` gets ``train.jsonl`` (one line per step), ``checkpoints/`` (the last two) and at the end ``adapter/`` (a
    ``PeftModel``'s active adapter, as peft saves it) or ``model/``, with the objective's own parts beside it in
    ``modules.safetensors``, named ``PART:WEIGHT``. ``progress`` is called with steps done, all steps
    and the line just logged. Raises ``ThriftyError`` on bad settings or data, on a loss that is not finite (nothing is
    saved then) and on a full disk. Ctrl-C finishes the step, saves a checkpoint and raises ``KeyboardInterrupt``.
    """
    # ---- set up
    folder = Path(folder)
    objective = objective or NLL()
    source: Source = data if hasattr(data, "next") else Shuffled(data, settings.batch_size, settings.seed)  # type: ignore[assignment]
    steps = _steps(settings, data)
    accelerator = accelerated(model)
    device, rank, world = accelerator.device, accelerator.process_index, accelerator.num_processes
    own_meter = meter is None
    meter = meter if meter is not None else Meter()
    bare, was_training = model, model.training
    extra = dict(objective.modules(bare))
    if extra and world > 1:
        raise ThriftyError(f"objective {type(objective).__name__} trains parts of its own: run it in one process")
    model = accelerator.prepare(bare).train()
    weights = {name: p for name, p in bare.named_parameters() if p.requires_grad}
    for part, module in extra.items():
        module.to(device).train()
        weights |= {f"{part}:{name}": p for name, p in module.named_parameters() if p.requires_grad}
        if hasattr(module, "get_input_embeddings"):  # a model of its own costs as the main one
            meter.watch(module, part)
    optimizer = adamw(weights, settings, device)
    config, isolates = laid_out(bare, settings)
    dial = Dial(bare)
    state = State(bare, optimizer, steps)
    begin(hooks, state, settings.seed)
    optimizer = state.optimizer
    meter.watch(bare)
    fixed = {k: v for k, v in dataclasses.asdict(settings).items() if k not in ("save_every", "tokens")}
    if getattr(objective, "needs_reference", False) and isinstance(source, Shuffled):
        source.examples = referenced(bare, source.examples, settings.tokens)  # of the model as it was given
        fixed[START] = total(weights)
    kept = weights | standing(bare)

    # ---- resume
    done = 0
    feedback: dict[str, float] = {}
    last = checkpoint.latest(folder / "checkpoints")
    accelerator.wait_for_everyone()
    if last is not None:
        saved = checkpoint.load(last)
        done, feedback = saved["step"], saved["feedback"]
        restore(last, saved, fixed, kept, optimizer, source, hooks)
    log = folder / "train.jsonl"
    lines = checkpoint.trim(log, done) if accelerator.is_main_process else []

    def save(step: int) -> None:
        nonlocal last
        if accelerator.is_main_process:
            whole = {
                "step": step,
                "settings": fixed,
                "feedback": feedback,
                "weights": kept,
                "optimizer": optimizer.state_dict(),
                "source": source.state_dict(),
                "hooks": [hook.state_dict() for hook in hooks],
            }
            last = checkpoint.save(folder / "checkpoints", step, whole)
        accelerator.wait_for_everyone()

    # ---- the loop
    with ExitStack() as stack:
        stack.callback(lambda: bare.train(was_training))
        for part in (bare, *extra.values()) if own_meter else ():  # no hook of ours stays on a model
            stack.callback(meter.forget, part)
        stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
        asked_to_stop = stack.enter_context(checkpoint.interrupts())
        for step in range(done, steps):
            started, spent = time.perf_counter(), meter.total().flops
            torch.manual_seed(int(np.random.SeedSequence([settings.seed, step, rank]).generate_state(1)[0]))
            documents = source.next(step, feedback)
            check_kind(documents, objective)
            batches = batches_of(documents, settings, isolates, rank, world, config)
            lr = learning_rate(settings, step, steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            state.step, state.batches = step, batches
            for hook in hooks:
                hook.before_step(state)

            loss_sum = torch.zeros((), device=device)
            logged: dict[str, float] = {}
            for i, batch in enumerate(batches):
                batch = batch.to(device)
                with ExitStack() as forward:
                    if i < len(batches) - 1:
                        forward.enter_context(accelerator.no_sync(model))
                    if batch.strengths is not None:
                        forward.enter_context(dial({adapter_name(bare): batch.strengths}))
                    forward.enter_context(scope(phase="train", padding=batch.input_ids.numel() - batch.tokens))
                    loss, logs = objective.loss(model, batch, step, extra)
                    accelerator.backward(loss * world)  # DDP takes the mean over processes, the loss is their sum
                loss_sum += loss.detach().float()
                logged = {name: logged.get(name, 0.0) + value for name, value in logs.items()}
            for hook in hooks:
                hook.after_backward(state)

            norm = torch.nn.utils.clip_grad_norm_(list(weights.values()), settings.clip or math.inf).float()
            sums = torch.stack([loss_sum, *map(loss_sum.new_tensor, (asked_to_stop(), *logged.values()))])
            total_loss, stop, *values = accelerator.reduce(sums, "sum").tolist()
            if not (math.isfinite(total_loss) and math.isfinite(norm)):
                raise not_finite(total_loss, float(norm), step + 1, lr, last or folder)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            state.loss = total_loss
            for hook in hooks:
                hook.after_step(state)

            feedback = {"loss": total_loss, **dict(zip(logged, values))}
            line = {
                "step": step + 1,
                **feedback,
                "lr": lr,
                "grad_norm": float(norm),
                "tokens": sum(map(len, documents)),
                "flops": (meter.total().flops - spent) * world,  # each process has as much to do
                "seconds": time.perf_counter() - started,
            }
            lines.append(line)
            if accelerator.is_main_process:
                with checkpoint.disk(log), log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                if progress is not None:
                    progress(step + 1, steps, line)
            if stop or step + 1 == steps or (settings.save_every and (step + 1) % settings.save_every == 0):
                save(step + 1)
            if stop and step + 1 < steps:
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1} of {steps}; run the same command again to go on"
                )

    # ---- what was learnt
    trained = folder / ("adapter" if hasattr(bare, "peft_config") else "model")
    if accelerator.is_main_process:
        save_trained(bare, trained, {name: p for name, p in weights.items() if name.split(":")[0] in extra})
    accelerator.wait_for_everyone()
    return TrainResult(
        folder=folder,
        trained=trained,
        steps=steps,
        losses=[line["loss"] for line in lines],
        tokens=int(sum(line["tokens"] for line in lines)),
        seconds=sum(line["seconds"] for line in lines),
    )


def accelerated(model: Any) -> Accelerator:
    """accelerate on the device that the model is on, or on this process's own of several."""
    on_cpu = next(model.parameters()).device.type == "cpu" and int(os.environ.get("WORLD_SIZE", "1")) == 1
    return Accelerator(cpu=on_cpu)


def laid_out(bare: Any, settings: Updates) -> tuple[Any, bool]:
    """The language model's configuration, and whether documents share rows."""
    config = bare.config.get_text_config(decoder=True)
    isolates = settings.layout != "bucketed" and packs(bare, config.vocab_size)
    if settings.layout == "packed" and not isolates:
        raise ThriftyError("this model does not keep packed documents apart: set layout=bucketed, or attention sdpa")
    return config, isolates


def adamw(weights: dict[str, Any], settings: Updates, device: torch.device) -> torch.optim.Optimizer:
    """AdamW over ``weights``, decay on matrices only; ThriftyError where there are none."""
    if not weights:
        raise ThriftyError(
            "nothing to train: no weight of the model requires a gradient; attach an adapter or unfreeze"
        )
    return torch.optim.AdamW(
        [
            {"params": [p for p in weights.values() if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in weights.values() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=device.type in ("cpu", "cuda"),
    )


def begin(hooks: Sequence[Hook], state: State, seed: int) -> None:
    """Start the hooks; what they draw follows from ``seed``, and torch's own stream is left as it was."""
    device = next(state.model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for hook in hooks:
            hook.start(state)


def save_trained(bare: Any, folder: Path, parts: dict[str, Any]) -> None:
    """Write the active adapter or the whole model to ``folder``, and an objective's ``parts`` beside it."""
    with checkpoint.disk(folder):
        if hasattr(bare, "peft_config"):
            save_adapter(bare, folder, adapter_name(bare))
        else:
            bare.save_pretrained(folder)
        if parts:
            save_file({name: p.detach().contiguous() for name, p in parts.items()}, folder / "modules.safetensors")


def learning_rate(settings: Updates, step: int, steps: int) -> float:
    """Of step ``step`` (from 0): linear warm-up to ``lr``, then down to ``floor * lr``, reached after the last step.

    >>> [round(learning_rate(Train(lr=1.0, warmup=2), step, 6), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    warmup = settings.warmup if settings.warmup >= 1 else settings.warmup * steps
    if step + 1 <= warmup:
        return settings.lr * (step + 1) / warmup
    at = (step - warmup) / max(1.0, steps - warmup)
    fall = {"cosine": (1 + math.cos(math.pi * at)) / 2, "linear": 1 - at, "constant": 1.0}[settings.schedule]
    return settings.lr * (settings.floor + (1 - settings.floor) * fall)


def _steps(settings: Train, data: Any) -> int:
    if (settings.steps is None) == (settings.epochs is None):
        raise ThriftyError("give either steps or epochs to the training settings")
    if settings.batch_size < 1 or settings.tokens < 1 or settings.row < 1 or not settings.lr > 0:
        raise ThriftyError(f"batch_size, tokens, row and lr must be above 0: {settings}")
    if settings.steps is not None:
        steps = settings.steps
    elif hasattr(data, "next"):
        raise ThriftyError("a source has no length, so epochs are unknown: give steps")
    else:
        steps = math.ceil((settings.epochs or 0) * len(data) / settings.batch_size)
    if steps < 1:
        raise ThriftyError(f"{steps} steps is nothing to do: give at least 1")
    return steps


def check_kind(documents: Sequence[Example | Pair], objective: Objective) -> None:
    """Raise ThriftyError where an objective on pairs is given single examples, or the other way round."""
    kind = Pair if getattr(objective, "pairs", False) else Example
    for document in documents:
        if not isinstance(document, kind):
            raise ThriftyError(
                f"objective {type(objective).__name__} is trained on {kind.__name__}s, not on "
                f"{type(document).__name__}s: choose another objective, or make them with thrifty.tune.batches"
            )


def batches_of(
    documents: Sequence[Example | Pair], settings: Any, isolates: bool, rank: int, world: int, config: Any
) -> list[Batch]:
    """This process's share of a step, laid out by ``settings.tokens`` and ``settings.row``.

    All processes see the same ``documents``.
    """
    if len(documents) < world:
        raise ThriftyError(
            f"a step of {len(documents)} examples cannot be split over {world} processes: raise batch_size"
        )
    total = float(sum(document.total for document in documents))
    if total == 0:
        raise ThriftyError(f"none of the {len(documents)} examples of a step has a target token with a loss")
    longest = max(len(document) for item in documents for document in item.documents)
    limit = getattr(config, "max_position_embeddings", None)
    if limit and longest > limit:
        raise ThriftyError(f"an example has {longest} tokens, the model's context {limit}: set max_length={limit}")
    share = sorted(documents, key=len)[rank::world]
    rows = packed(share, settings.tokens, settings.row) if isolates else bucketed(share, settings.tokens)
    batches = [dataclasses.replace(collate(batch), total=total) for batch in rows]
    largest = max(int(batch.input_ids.max()) for batch in batches)
    if largest >= config.vocab_size:
        raise ThriftyError(
            f"token id {largest} is beyond the model's vocabulary of {config.vocab_size}: use its own tokenizer"
        )
    return batches


def total(weights: dict[str, Any]) -> float:
    return float(sum(p.detach().double().sum() for p in weights.values()))


def standing(bare: Any) -> dict[str, Any]:
    """The model's buffers that are saved with it: an adapter may hold parts there that its weights belong to."""
    saved = bare.state_dict().keys()
    return {name: value for name, value in bare.named_buffers() if name in saved}


def adapter_name(model: Any) -> str:
    if not hasattr(model, "peft_config"):
        raise ThriftyError("examples have strengths of their own, but the model has no adapter: attach a LoRA first")
    name: str = model.active_adapters[0]
    return name


def restore(
    folder: Path,
    saved: dict[str, Any],
    fixed: dict[str, Any],
    weights: dict[str, Any],
    optimizer: torch.optim.Optimizer,
    source: Source,
    hooks: Sequence[Hook],
) -> None:
    changed = [f"{k} was {saved['settings'].get(k)}, is {v}" for k, v in fixed.items() if saved["settings"].get(k) != v]
    if changed:
        raise ThriftyError(
            f"{folder} was made with other settings ({'; '.join(changed)}): set them back, or train into a new folder"
        )
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in saved["weights"].items()}:
        raise ThriftyError(f"{folder} holds other trained weights than this model's: train into a new folder")
    with torch.no_grad():
        for name, value in saved["weights"].items():
            weights[name].copy_(value)
    optimizer.load_state_dict(saved["optimizer"])
    source.load_state_dict(saved["source"])
    if len(hooks) != len(saved["hooks"]):
        raise ThriftyError(f"{folder} was made with {len(saved['hooks'])} hooks, not {len(hooks)}: give the same ones")
    for hook, state in zip(hooks, saved["hooks"]):
        hook.load_state_dict(state)


class Diverged(ThriftyError):  # noqa: N818 - it says what happened, and a grid goes on after it
    """A loss or a gradient that is not finite."""


def not_finite(loss: float, norm: float, step: int, lr: float, kept: Path) -> Diverged:
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
    return Diverged(
        f"{what} at step {step} (learning rate {lr:.3g}), so training stopped and this step was not applied; {kept} is "
        f"as it was. Lower lr (try {lr / 3:.1g}), lengthen warmup, or load the model in float32"
    )
