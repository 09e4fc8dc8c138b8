"""``thrifty adapter``: does vLLM take a LoRA folder, the folder at strengths of its own, the folder as a small file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from thrifty.contracts import ThriftyError


@click.group()
def main() -> None:
    """Check a LoRA folder for vLLM, write it at several strengths, a folder each, or compress it into a file."""


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--max-lora-rank", type=int, help="What vLLM is started with.  [default: whatever it needs]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
@click.pass_context
def check(ctx: click.Context, folder: Path, max_lora_rank: int | None, as_json: bool) -> None:
    """Say whether vLLM serves the adapter in FOLDER, and what else to do. Exit code: 0 where it does, 1 where not."""
    from thrifty.engines import _vllm_lora as lora

    report = lora.check_lora(folder, max_lora_rank)
    if as_json:
        whole = dataclasses.asdict(report) | {"folder": str(folder), "accepted": report.accepted, "vllm": lora.VERSION}
        click.echo(json.dumps(whole, indent=1))
    else:
        for fault in report.faults:
            click.echo(f"{fault.what}: {fault.remedy}")
        if report.accepted:
            click.echo(f"vLLM {lora.VERSION} takes {folder}: rank {report.rank}, {len(report.modules)} layers; "
                       f"start it with --enable-lora --max-lora-rank {report.needed}")  # fmt: skip
        for note in report.notes:
            click.echo(f"note: {note}")
    ctx.exit(0 if report.accepted else 1)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--strength", required=True, help="One or several, such as 0.5 or 0.25,0.5,1.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the folders.")
def export(folder: Path, strength: str, out: Path) -> None:
    """Write the LoRA in FOLDER once per strength, and print the `vllm serve` line for all of them."""
    from thrifty.engines import _vllm_lora as lora

    try:
        strengths = [float(part) for part in strength.split(",")]
    except ValueError:
        raise ThriftyError(f"--strength {strength!r}: give numbers with commas between, such as 0.25,0.5,1") from None
    served = lora.export_strengths(folder, strengths, out)
    for path in served.values():
        click.echo(f"wrote {path}")
    base = str(lora.read_config(folder).get("base_model_name_or_path") or "MODEL")
    click.echo(lora.serve_line(base, served, lora.check_lora(folder).needed or 0))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--codec", required=True, help="Key of a weights.codec method, with fields after a colon.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@click.option("--initial", type=click.Path(path_type=Path), help="Folder of the adapter as it was before training.")
@click.option("--seed", type=int, help="In place of --initial: the --seed of the `thrifty run` that trained it.")
@click.option("--base", help="Model that --seed draws for.  [default: what adapter_config.json names]")
def compress(
    folder: Path, codec: str, out: Path, initial: Path | None, seed: int | None, base: str | None
) -> None:  # fmt: skip
    """Write the LoRA in FOLDER as one small file, for `thrifty adapter expand`.

    A codec stores what training changed. Give --initial or --seed, so that all of it is coded; with neither only
    lora_B is, which every LoRA begins with as zero, and lora_A is kept as it is: about half the size, no smaller.
    """
    from thrifty.commands import _compressed

    if initial is not None and seed is not None:
        raise ThriftyError("--initial and --seed both say what the adapter began as: give one of them")
    made = _compressed.compress(folder, codec, out, initial, seed, base)
    dense = _compressed.size(folder)
    click.echo(f"wrote {out}: {made:,} bytes, {dense / made:.1f} times smaller than {folder} ({dense:,} bytes)")
    if initial is None and seed is None:
        click.echo("lora_A is kept as it is: with --initial FOLDER or --seed N it would be coded too")


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--initial", type=click.Path(path_type=Path), help="Folder of the adapter as it was before training.")
@click.option("--base", help="Model that the seed in FILE draws for.  [default: what adapter_config.json names]")
def expand(file: Path, out: Path, initial: Path | None, base: str | None) -> None:
    """Write the adapter that `thrifty adapter compress` put into FILE as a LoRA folder, for peft and --adapter."""
    from thrifty.commands import _compressed

    header = _compressed.expand(file, out, initial, base)
    click.echo(f"wrote {out}, as {header['codec']} left it; `thrifty measure --adapter {out}` measures it")
