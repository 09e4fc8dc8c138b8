"""Hugging Face data sets as tasks: from the hub, its local cache, or a local folder in the hub's layout.

A data set's own test split is the test split (its validation split where it has no test split); its train split is
spread over train, calibration and dev by content, less the questions that also stand in the test split. A data set
with one split of another name, or with train only, is spread over all four by content.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from thrifty.contracts import Split, ThriftyError
from thrifty.tasks.files import TableTask
from thrifty.tasks.spec import SPLITS, did_you_mean
from thrifty.tasks.tables import PEEK, Row, Table


class HubTable:
    """One split of a data set; positions are row numbers from 0."""

    def __init__(self, name: str, rows: Any) -> None:
        self.name = name
        self._rows = rows

    def peek(self) -> list[Row]:
        return [dict(row) for row in self._rows.select(range(min(PEEK, len(self._rows))))]

    def columns(self) -> list[str]:
        return list(self._rows.column_names)

    def scan(self, columns: Sequence[str]) -> Iterator[tuple[int, int, tuple[Any, ...]]]:
        first = 0
        for batch in self._rows.select_columns(list(dict.fromkeys(columns))).iter(1000):
            lists = [batch[name] for name in columns]
            for i, values in enumerate(zip(*lists)):
                yield first + i, first + i + 1, values
            first += len(lists[0])

    def fetch(self, positions: Sequence[int]) -> list[Row]:
        return [dict(row) for row in self._rows.select(list(positions))]


def hub_task(
    name: str, dataset: str, *, question: str | None, answer: str | None, split: str | None, gold: bool
) -> TableTask:
    """The task ``hf:DATASET[:CONFIG]``.

    ``split`` takes one split of the data set only: named like one of ours, all its rows belong to that
    one (and where the data set has a single split, that is taken); otherwise they are spread by content.
    """
    path, config = _path_and_config(dataset)
    parts = _load(path, config)
    tables: dict[str, Table] = {
        key: HubTable(f"hf:{dataset} ({key})", rows) for key, rows in parts.items() if len(rows)
    }
    if not tables:
        raise ThriftyError(f"hf:{dataset} has no rows.")
    return TableTask(name, _declare(dataset, tables, split), question=question, answer=answer, gold=gold)


def _declare(dataset: str, tables: dict[str, Table], split: str | None) -> list[tuple[Table, Split | None]]:
    if split is not None:
        declared: Split | None = next((ours for ours in SPLITS if ours == split), None)
        if split in tables:
            return [(tables[split], declared)]
        if declared and len(tables) == 1:
            return [(next(iter(tables.values())), declared)]
        raise ThriftyError(
            f"hf:{dataset} has no split {split!r}. {did_you_mean(split, tables)}Its splits: {', '.join(tables)}."
        )
    held_out = next((key for key in ("test", "validation", "valid", "dev") if key in tables), None)
    if "train" in tables:
        return [(tables["train"], None)] + ([(tables[held_out], "test")] if held_out else [])
    if len(tables) == 1:
        key, table = next(iter(tables.items()))
        return [(table, "test" if key == "test" else None)]
    if held_out:
        return [(tables[held_out], "test")]
    raise ThriftyError(
        f"hf:{dataset} has the splits {', '.join(tables)}, but neither train nor test. Choose one with ?split=NAME."
    )


def _path_and_config(dataset: str) -> tuple[str, str | None]:
    if Path(dataset).is_dir():
        return dataset, None
    path, _, config = dataset.rpartition(":") if ":" in dataset else (dataset, "", "")
    return path, config or None


def _is_local(path: str) -> bool:
    return path.startswith((".", "/", "~")) or Path(path).is_dir()


def _load(path: str, config: str | None) -> dict[str, Any]:
    if _is_local(path):
        path = str(Path(path).expanduser())
        if not Path(path).is_dir():
            if Path(path).is_file():
                raise ThriftyError(f"hf:{path} is a file, not a data set folder. Load it as file:{path}.")
            raise ThriftyError(f"hf:{path}: there is no such folder (looked from {Path.cwd()}). Check the path.")
    import datasets

    datasets.disable_progress_bars()
    try:
        with nullcontext() if _is_local(path) else _offline_if_unreachable():
            try:
                loaded = datasets.load_dataset(path, config)
            except ValueError as error:
                if config is not None or "Config name is missing" not in str(error):
                    raise
                config = _choose_config(datasets, path)
                loaded = datasets.load_dataset(path, config)
    except ThriftyError:
        raise
    except Exception as error:
        raise _explain(path, config, error) from error
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _choose_config(datasets: Any, path: str) -> str:
    """GSM8K's "main"; where there is none, the user has to choose."""
    configs = list(datasets.get_dataset_config_names(path))
    if "main" in configs:
        return "main"
    raise ThriftyError(
        f"hf:{path} has several configurations. Choose one, as in hf:{path}:{configs[0]}. It has: {', '.join(configs)}."
    )


def _explain(path: str, config: str | None, error: Exception) -> ThriftyError:
    kind, text = type(error).__name__, " ".join(str(error).split())[:300]
    if "BuilderConfig" in text:
        return ThriftyError(f"hf:{path} has no configuration {config!r}: {text}")
    if _is_local(path):
        return ThriftyError(f"hf:{path} cannot be loaded as a data set folder: {text}. Load one file with file:PATH.")
    if isinstance(error, ConnectionError) or "Offline" in kind or "offline" in text or "Couldn't reach" in text:
        return ThriftyError(
            f"hf:{path} is not on this machine and the hub cannot be reached ({text}). Connect, or fetch it "
            f"elsewhere (hf download --repo-type dataset {path} --local-dir DIR) and use hf:DIR or file:DIR/FILE."
        )
    if kind == "DatasetNotFoundError" or "RepositoryNotFound" in kind:
        return ThriftyError(
            f"hf:{path} is not on the hub, or it is gated or private: {text}. Check the name at "
            "huggingface.co/datasets; for a gated one accept its terms and run: hf auth login"
        )
    if "script" in text:
        return ThriftyError(
            f"hf:{path} is made by a program of its own, which is not run. Use a copy in Parquet or JSONL: {text}"
        )
    return ThriftyError(f"hf:{path} cannot be loaded: {kind}: {text}")


@contextmanager
def _offline_if_unreachable() -> Iterator[None]:
    """Use only the local cache when the hub cannot be reached: its client would retry for 25 s before it says so."""
    proxies = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")
    url = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if url.hostname is None or any(os.environ.get(name) for name in proxies):
        yield
        return
    try:
        socket.create_connection((url.hostname, url.port or (80 if url.scheme == "http" else 443)), timeout=5).close()
    except OSError:
        import datasets.config
        import huggingface_hub.constants

        settings: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
        before = [module.HF_HUB_OFFLINE for module in settings]
        try:
            for module in settings:
                module.HF_HUB_OFFLINE = True
            yield
        finally:
            for module, value in zip(settings, before):
                module.HF_HUB_OFFLINE = value
    else:
        yield
