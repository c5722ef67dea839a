"""What public reports and an attack found of params.yaml: an input a row, and the line that is right."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.config.read import load_params
from tests.support.project import ROOT, line_of


def replaced(old: str, new: str) -> str:
    found = (ROOT / "params.yaml").read_text(encoding="utf-8")
    assert old in found
    return found.replace(old, new, 1)


def added(lines: str) -> str:
    return (ROOT / "params.yaml").read_text(encoding="utf-8") + lines


LEVELS = range(9)
LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in LEVELS)
MERGED = "a0: &a0 {k: v}\n" + "".join(f"a{i + 1}: &a{i + 1} {{<<: [{', '.join([f'*a{i}'] * 10)}]}}\n" for i in LEVELS)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (added(LAUGHS), "aliases stand for more than 100,000 values"),
        (added(MERGED), "aliases stand for more than 100,000 values"),
        (replaced("kwargs: {}", "kwargs: &x {a: *x}"), "params.yaml:23: the alias *x stands for what contains it"),
        (replaced("kwargs: {}", "kwargs: &x {<<: *x}"), "the alias *x stands for what contains it"),
        (replaced("feature_columns: []", "feature_columns: &x [*x]"), "the alias *x stands for what contains it"),
        (replaced("kwargs: {}", "kwargs: {a: *x}"), "undefined alias"),
        (added("a: " + "[" * 20_000), "nested deeper than 50 levels"),
        (replaced("kwargs: {}", "kwargs: " + "{a: " * 60 + "1" + "}" * 60), "nested deeper than 50 levels"),
        (replaced("batch_size: 16", "batch_size: " + "9" * 5000), ": a number of 5000 digits"),
        (replaced("batch_size: 16", "batch_size: 0x" + "f" * 5000), "a number of 5002 digits"),
        (replaced("kwargs: {}", "kwargs: {a: -" + "9" * 5000 + "}"), "a number of 5001 digits"),
        (replaced("learning_rate: 1e-4", "learning_rate: " + "1" * 400), "a number of 400 digits"),
        (replaced("batch_size: 16", f"batch_size: {2**63}"), "batch_size is 9223372036854775808; it should"),
        (replaced("batch_size: 16", f"batch_size: {2**40}"), "less than or equal to 2147483647"),
        (replaced("eval_batch_size: ", f"eval_batch_size: {2**40}  # "), "less than or equal to 2147483647"),
        (replaced("max_steps: ", f"max_steps: {2**70} #"), "less than or equal to 9223372036854775807"),
        (replaced("kwargs: {}", "kwargs: {a: 2020-01-01}"), "model.kwargs: the keyword 'a' holds datetime.date("),
        (replaced("kwargs: {}", "kwargs: {a: 2001-13-45}"), "month must be in 1..12"),
        (replaced("kwargs: {}", "kwargs: {a: [.nan]}"), "model.kwargs: the keyword 'a' holds nan"),
        (replaced("kwargs: {}", "kwargs: {a: !!set {b}}"), "the keyword 'a' holds {'b'}"),
        (replaced("kwargs: {}", "kwargs: {a: !!int b}"), "invalid literal for int()"),
        (replaced("kwargs: {}", "kwargs: {a: !!python/object/apply:os.system [b]}"), "could not determine a"),
        (replaced("path: data/sample", r'path: "a\0b"'), "holds a NUL"),
        (added("1: 2\n"), "1 is no key"),
        (replaced("kwargs: {}", "kwargs: {num_labels: 5}"), "model.kwargs: num_labels comes from the labels in"),
        (replaced("kwargs: {}", "kwargs: {id2label: {a: b}}"), "model.kwargs: id2label comes from the labels in the"),
        (replaced("kwargs: {}", "kwargs: {dtype: float16}"), "model.kwargs: dtype comes from train.precision; leave"),
        (replaced("kwargs: {}", "kwargs: {model_type: gpt2}"), "model.kwargs: model_type comes from model.source"),
        (replaced("greater_is_better: ", "greater_is_better: false #"), "is accuracy: higher is better; write null"),
        (replaced("path: data/sample", "path: " + "a" * 256), "is longer than any path"),
        (replaced("tokenizer: ", "tokenizer: " + "a/" * 2050 + " #"), "is longer than any path"),
        (replaced("source: package:", "source: ~no-such-user/"), "there is no such user; write the whole path"),
    ],
)  # fmt: skip
def test_parameters_that_would_take_for_ever_or_fit_nothing_are_one_line_at_once(
    content: str, expected: str, tmp_path: Path
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(content, encoding="utf-8")
    began = time.process_time()
    assert expected in line_of(lambda: load_params(path))
    assert time.process_time() - began < 1


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: os.mkfifo(path)])
def test_parameters_that_are_no_file_are_one_line(make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / "params.yaml")
    assert "params.yaml: no such file" in line_of(lambda: load_params(tmp_path / "params.yaml"))


def test_aliases_as_people_use_them_are_followed(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    content = replaced("seed: 0", "seed: &seed 7").replace("seed: 0", "seed: *seed")
    path.write_text(content.replace("kwargs: {}", "kwargs: &none {}", 1).replace("_kwargs: {}", "_kwargs: *none"))
    params = load_params(path)
    assert (params.data.seed, params.build_loaders.seed, params.train.seed) == (7, 7, 7)
