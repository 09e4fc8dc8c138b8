"""Tokens per second of thrifty's engine against one big batched ``model.generate``, on the same prompts and samples.

    python bench/generate.py                       # a random model of a student's shape
    python bench/generate.py --model DIR

Case 1: all responses have the same length. Case 2: lengths vary tenfold; ``generate`` runs a batch to its longest row,
and only the tokens asked for are counted. ``generate`` first gets the batch size at which it is fastest; then both run
in turn (A B A B), a fresh engine every time, tokenising and decoding included. With one thread on a CPU the clock is
the process's CPU time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from thrifty.contracts import Sample
from thrifty.engines.local import LocalEngine
from thrifty.models.load import Loaded, load, wrap


def clock() -> float:
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def student(vocabulary: int = 400) -> Loaded:
    """A random model of a student's shape: d = 128, 4 layers, word-level tokenizer."""
    words = {"<eos>": 0, "<pad>": 1} | {f"w{i}": i for i in range(2, vocabulary)}
    raw = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<pad>")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=True,
    )  # fmt: skip
    return wrap(Qwen3ForCausalLM(config).eval(), tokenizer, "random student")


def with_engine(loaded: Loaded, prompts: list[str], lengths: np.ndarray, batch_size: int) -> float:
    """Seconds for ``lengths [prompts, samples]`` tokens through the engine."""
    started = clock()
    engine = LocalEngine(loaded, batch_size=batch_size, temperature=1.0)
    samples = lengths.shape[1]
    for i, prompt in enumerate(prompts):
        for j in range(samples):
            engine.submit(i * samples + j, Sample(prompt, max_tokens=int(lengths[i, j])), (i, j))
    made = 0
    while engine.busy:
        made += sum(len(trace.ids) for _, trace in engine.poll())
    assert made == lengths.sum(), (made, lengths.sum())
    return clock() - started


@torch.inference_mode()
def with_generate(loaded: Loaded, prompts: list[str], lengths: np.ndarray, batch_size: int) -> float:
    """Seconds for the same through ``model.generate``, ``batch_size`` rows at once, left-padded."""
    started = clock()
    samples, pad = lengths.shape[1], loaded.tokenizer.pad_token_id or 0
    step = max(1, batch_size // samples)
    for at in range(0, len(prompts), step):
        encoded = [loaded.chat.prompt_ids(prompt) for prompt in prompts[at : at + step]]
        width = max(map(len, encoded))
        ids = torch.tensor([[pad] * (width - len(one)) + one for one in encoded], device=loaded.device)
        seen = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in encoded], device=loaded.device)
        out = loaded.model.generate(
            ids, attention_mask=seen, num_return_sequences=samples, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=int(lengths[at : at + step].max()), eos_token_id=None, pad_token_id=pad,
        )  # fmt: skip
        loaded.tokenizer.batch_decode(out[:, width:])
    return clock() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, asset or Hub id; default: a random model of a student's shape")
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=256, help="rows at once in the engine")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    loaded = load(options.model) if options.model else student()
    # Nobody ends early: the lengths are the comparison.
    loaded = Loaded(
        loaded.model, loaded.tokenizer, loaded.chat, loaded.name, loaded.folder, frozenset(), loaded.context
    )
    rng = np.random.default_rng(0)
    if options.model:
        prompts = [f"{a} + {b} * {c} ?" for a, b, c in rng.integers(0, 100, (options.prompts, 3))]
    else:
        prompts = [" ".join(f"w{i}" for i in rng.integers(2, 400, n)) for n in rng.integers(16, 40, options.prompts)]
    shape = (options.prompts, options.samples)
    cases = {
        "equal lengths (64)": (np.full(shape, 64), 1.0),
        "lengths vary tenfold (20-200, log-uniform)": (
            np.exp(rng.uniform(np.log(20), np.log(200), shape)).astype(int),
            1.3,
        ),
    }
    print(
        f"{loaded.name} on {loaded.device}, {torch.get_num_threads()} threads, {shape[0]} prompts x {shape[1]} samples"
    )
    for name, (lengths, target) in cases.items():
        speed = {}
        for size in sorted({min(size, lengths.size) for size in (64, 256, 512, 1024, 2048)}):
            few = slice(0, size // options.samples)
            speed[size] = lengths[few].sum() / with_generate(loaded, prompts[few], lengths[few], size)
        best = max(speed, key=lambda size: speed[size])
        print(f"\n{name}: generate makes " + ", ".join(f"{v:.0f} tokens/s at {k} rows" for k, v in speed.items()))
        ratios = []
        for _ in range(options.rounds):
            ours = with_engine(loaded, prompts, lengths, options.batch)
            theirs = with_generate(loaded, prompts, lengths, best)
            ratios.append(theirs / ours)
            print(
                f"  engine {lengths.sum() / ours:8.0f} tokens/s   generate {lengths.sum() / theirs:8.0f} tokens/s   "
                f"ratio {ratios[-1]:.2f}",
                flush=True,
            )
        middle = statistics.median(ratios)
        print(f"  median ratio {middle:.2f}, target {target}: {'reached' if middle >= target else 'missed'}")


if __name__ == "__main__":
    main()
