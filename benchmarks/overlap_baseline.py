"""Majority class and word overlap on a paraphrase data set: what a model has to beat.

python benchmarks/overlap_baseline.py [FOLDER with train.csv and test.csv]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression


def overlap(rows: pd.DataFrame) -> np.ndarray:
    """Jaccard and containment of the two sentences' sets of lower-case words, shape (rows, 2)."""
    features = []
    for first, second in zip(rows["sentence1"], rows["sentence2"], strict=True):
        a, b = (set(re.findall(r"\w+", text.lower())) for text in (first, second))
        features.append([len(a & b) / len(a | b), len(a & b) / min(len(a), len(b))])
    return np.array(features)


def main() -> None:
    """Print both accuracies on the test split."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "data/sample")
    train, test = (pd.read_csv(folder / f"{split}.csv") for split in ("train", "test"))
    majority = train["label"].mode()[0]
    model = LogisticRegression().fit(overlap(train), train["label"])
    print(f"majority class: {(test['label'] == majority).mean():.4f}")
    print(f"word overlap:   {model.score(overlap(test), test['label']):.4f}")


if __name__ == "__main__":
    main()
