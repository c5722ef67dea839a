"""Handwritten digits, 8 by 8 pixels: scikit-learn's copy of the UCI data, 1,797 rows."""

from __future__ import annotations

from pathlib import Path

from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write(folder: Path) -> None:
    """Write train.csv, validation.csv and test.csv: the columns pixel_00 to pixel_63 (0 to 16) and digit."""
    digits = load_digits(as_frame=True)
    rows = digits.data.astype(int).set_axis([f"pixel_{i:02}" for i in range(64)], axis=1).assign(digit=digits.target)
    rest, test = train_test_split(rows, test_size=360, stratify=rows["digit"], random_state=0)
    train, validation = train_test_split(rest, test_size=240, stratify=rest["digit"], random_state=0)
    for name, split in (("train", train), ("validation", validation), ("test", test)):
        split.to_csv(folder / f"{name}.csv", index=False, lineterminator="\n")
