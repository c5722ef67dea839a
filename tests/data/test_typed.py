"""Columns of whatever type a file gives them: which become text, and how, and which are refused."""

from __future__ import annotations

from datetime import date
from typing import Any

import pytest

from stages import tokenize as stage
from stages.ground.running import run_command
from tests.support.project import Project
from tests.support.reading import Refused, parquet, raw

# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("values", "kind"), [([[1], [2]], "int64"), ([b"a", b"b"], "binary"), ([date(2020, 1, 31)] * 2, "date32")]
)
def test_parquet_column_that_is_no_text_is_refused_with_its_type(
    project: Project, refused: Refused, values: list[Any], kind: str
) -> None:
    project.write_params()
    parquet(project.folder / "data/in/train.parquet", text=values, label=["a", "b"])
    line = refused(project)
    assert "train.parquet" in line and "'text'" in line and kind in line


# ---------------------------------------------------------------------------------------------- good input


def test_json_and_parquet_numbers_and_booleans_become_their_text(project: Project) -> None:
    project.write_params(data={"text_columns": ["text", "more"]})
    rows = '{"text": 1, "more": 2.50, "label": true}\n{"text": "x", "more": 1e5, "label": false}\n'
    project.write("data/in/train.jsonl", rows)
    parquet(project.folder / "data/in/dev.parquet", text=[1, 2], more=[0.5, 2.5], label=[True, False])
    run_command(stage.main)
    assert [raw("train")[name] for name in ("text", "more", "label")] == [
        ["1", "x"],
        ["2.50", "1e5"],
        ["true", "false"],
    ]
    assert [raw("validation")[name] for name in ("text", "more", "label")] == [
        ["1", "2"],
        ["0.5", "2.5"],
        ["true", "false"],
    ]
