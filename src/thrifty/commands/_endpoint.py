"""What commands share that ask a model behind an endpoint: options, their check, the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from thrifty.contracts import ThriftyError

_KEYS = ("engine", "base_url", "api_key_env", "tokenizer")


def options(command: Any) -> Any:
    """Decorate a command with the options of an endpoint; ``taken`` reads them."""
    for option in reversed(
        (
            click.option(
                "--engine",
                type=click.Choice(["local", "openai"]),
                default="local",
                help="openai: --model is the name of a model behind --base-url, --batch-size how many streams are "
                "open at once.",
            ),
            click.option("--base-url", help="Of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."),
            click.option("--api-key-env", help="Environment variable that holds the server's key."),
            click.option(
                "--tokenizer", help="Of the served model: folder or Hub id. Counts exactly, continues responses."
            ),
        )
    ):
        command = option(command)
    return command


def taken(given: dict[str, Any], adapter: Path | None) -> dict[str, Any]:
    """Take the endpoint's options out of ``given``: what of them belongs into a run's configuration.

    Raises ThriftyError where they do not fit together.
    """
    served = {key: given.pop(key) for key in _KEYS}
    lonely = [f"--{key.replace('_', '-')}" for key, value in served.items() if key != "engine" and value is not None]
    if served["engine"] == "local" and lonely:
        raise ThriftyError(f"{', '.join(lonely)} belongs to an endpoint: give --engine openai")
    if served["engine"] == "openai" and served["base_url"] is None:
        raise ThriftyError("--engine openai needs --base-url, such as http://127.0.0.1:8000/v1")
    if served["engine"] == "openai" and adapter is not None:
        raise ThriftyError("--adapter turns a model that is loaded here: an endpoint serves the model that it serves")
    return served if served["base_url"] else {}


def engine(lab: Any, config: dict[str, Any]) -> Any:
    """The engine of a configuration with a ``base_url``."""
    from thrifty.engines.openai import OpenAIEngine

    return OpenAIEngine(
        config["base_url"], config["model"], config["tokenizer"], config["api_key_env"],
        concurrency=lab.batch_size, seed=lab.seed, max_tokens=lab.max_tokens,
    )  # fmt: skip
