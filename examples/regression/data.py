"""Diabetes, 442 patients: scikit-learn's copy of the data of Efron, Hastie, Johnstone and Tibshirani (2004).

Ten measurements at the start, and the disease's progression in the year after, a number from 25 to 346.
"""

from __future__ import annotations

from pathlib import Path

from sklearn.datasets import load_diabetes
from sklearn.model_selection import train_test_split


def write(folder: Path) -> None:
    """Write train.csv, validation.csv and test.csv: ten columns of numbers as they were measured, and progression."""
    rows = load_diabetes(as_frame=True, scaled=False).frame.rename(columns={"target": "progression"})
    rest, test = train_test_split(rows, test_size=90, random_state=0)
    train, validation = train_test_split(rest, test_size=60, random_state=0)
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        split.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
