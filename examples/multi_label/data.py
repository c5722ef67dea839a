"""The sample's sentence pairs with labels that can hold together: none, one or several a row."""

from __future__ import annotations

import csv
import re
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[2] / "data/sample"
NUMBER = re.compile(
    r"\d|\b(two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|(thir|four|fif|six|seven|eigh|nine)teen"
    r"|(twen|thir|for|fif|six|seven|eigh|nine)ty|hundred|thousand|million)\b",
    re.IGNORECASE,
)
PRONOUN = re.compile(r"\b(I|me|my|we|us|our|you|your|he|him|his|she|her|they|them|their)\b", re.IGNORECASE)


def labels(first: str, second: str, label: str) -> list[str]:
    """The labels of a pair: whether both say the same, and whether either has a number or a personal pronoun."""
    both = f"{first} {second}"
    holds = {
        "equivalent": label == "equivalent",
        "number": NUMBER.search(both) is not None,
        "pronoun": PRONOUN.search(both) is not None,
    }
    return [name for name, it_does in holds.items() if it_does]


def write(folder: Path) -> None:
    """Write train.csv, validation.csv and test.csv; the labels are in one cell, joined by commas."""
    for split in ("train", "validation", "test"):
        source, target = SAMPLE / f"{split}.csv", folder / f"{split}.csv"
        with source.open(newline="", encoding="utf-8") as rows, target.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(["sentence1", "sentence2", "labels"])
            for row in csv.DictReader(rows):
                pair = row["sentence1"], row["sentence2"]
                writer.writerow([*pair, ",".join(labels(*pair, row["label"]))])
