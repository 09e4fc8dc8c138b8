"""Accuracy and thinking tokens of a student, by plain batched sampling: for training gates and model cards."""

from __future__ import annotations

from typing import Any

import torch

from thrifty.contracts import Problem, Split, Task


@torch.no_grad()
def respond(
    model: Any, tokenizer: Any, prompts: list[str], temperature: float = 0.7, max_new: int = 480, batch: int = 256
) -> list[list[int]]:
    """Response ids, one per prompt: left-padded batches of prompts of like length, finished rows dropped."""
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    asked = [
        tokenizer(f"<|user|>{prompt}<|assistant|><think>", add_special_tokens=False)["input_ids"] for prompt in prompts
    ]
    found: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    for at in range(0, len(order), batch):
        rows = torch.tensor(order[at : at + batch])
        width = max(len(asked[i]) for i in rows)
        ids = torch.tensor([[pad] * (width - len(asked[i])) + asked[i] for i in rows])
        mask = torch.tensor([[0] * (width - len(asked[i])) + [1] * len(asked[i]) for i in rows])
        cache = None
        for _ in range(max_new):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            out = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logits = out.logits[:, -1].float()
            rates = torch.softmax(logits / temperature, -1) if temperature else None
            chosen = logits.argmax(-1, keepdim=True) if rates is None else rates.multinomial(1)
            for i, token in zip(rows.tolist(), chosen[:, 0].tolist()):
                found[i].append(token)
            going = chosen[:, 0] != end
            if not going.any():
                break
            ids, mask = chosen, torch.cat([mask, torch.ones_like(chosen)], 1)
            if going.sum() < 0.8 * len(rows):
                keep = going.nonzero()[:, 0]
                ids, mask, rows = ids[keep], mask[keep], rows[keep]
                cache.batch_select_indices(keep)
        # Rows that ended but were not yet dropped went on: cut at the first end.
        for i in order[at : at + batch]:
            if end in found[i]:
                found[i] = found[i][: found[i].index(end) + 1]
    return found


def accuracy_tokens(
    model: Any, tokenizer: Any, task: Task, split: Split, n: int, prefix: str = "", seed: int = 0
) -> dict[int, tuple[float, float, float]]:
    """Per level: accuracy, mean thinking tokens and completion rate over ``n`` problems in all, sampled at T = 0.7."""
    model.eval()
    torch.manual_seed(seed)
    problems = task.problems(split, n, seed)
    close = tokenizer.convert_tokens_to_ids("</think>")
    responses = respond(model, tokenizer, [prefix + problem.prompt for problem in problems])
    cells: dict[int, list[tuple[float, int, bool]]] = {}
    for problem, ids in zip(problems, responses):
        cells.setdefault(problem.level, []).append(_score(task, problem, ids, close, tokenizer))
    return {level: tuple(sum(column) / len(rows) for column in zip(*rows)) for level, rows in sorted(cells.items())}


def _score(task: Task, problem: Problem, ids: list[int], close: int, tokenizer: Any) -> tuple[float, int, bool]:
    if close not in ids or ids[-1] != tokenizer.eos_token_id:
        return 0.0, len(ids), False
    at = ids.index(close)
    return task.grade(problem, tokenizer.decode(ids[at + 1 : -1])).score, at, True
