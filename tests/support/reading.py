"""Raw files as tests write them, and the rows that tokenize made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.batches import tokenized as store
from tests.support.project import Project

GOOD = "text,label\n" + "the cat sat,a\nthe dog ran,b\n" * 20
Refused = Callable[[Project], str]


def raw(split: str) -> dict[str, list[Any]]:
    return store.load_raw(store.TOKENIZED, split).to_dict()


def parquet(path: Path, **columns: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_rows(folder: Path, suffix: str, rows: list[tuple[str, str]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if suffix == ".parquet":
        parquet(folder / "train.parquet", text=[text for text, _ in rows], label=[label for _, label in rows])
    elif suffix in (".jsonl", ".json"):
        lines = jsonl(*({"text": text, "label": label, "other": 1} for text, label in rows))
        (folder / f"train{suffix}").write_text(lines, encoding="utf-8")
    else:
        import csv

        with (folder / f"train{suffix}").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",")
            writer.writerows([("other", "text", "label"), *(("1", text, label) for text, label in rows)])
