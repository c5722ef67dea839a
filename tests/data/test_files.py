"""Data files: every cell as typed, and each kind of bad file refused in one line that says where and what to do."""

from __future__ import annotations

import pytest

from stages import tokenize as stage
from stages.ground.running import run_command
from tests.support.project import Project
from tests.support.reading import GOOD, Refused, jsonl, parquet, raw, write_rows

# ---------------------------------------------------------------------------------------------- bad input

BAD_FILES: dict[str, tuple[str, str | bytes, list[str]]] = {
    "short row": ("train.csv", "text,label\na b,x\nc d\n", ["train.csv", "line 3", "1 field", "2"]),
    "long row": ("train.csv", 'text,label\n"a\nb",x\nc, d,y\n', ["train.csv", "line 4", "3 fields", "quotes"]),
    "long row, TSV": ("train.tsv", "text\tlabel\na\tx\ty\n", ["train.tsv", "line 2", "3 fields", "a tab in"]),
    "open quote": ("train.csv", 'text,label\na,x\n"b,y\nc,z\n', ["train.csv", "starts on line 3", "quote"]),
    "text after quote": ("train.csv", 'text,label\n"b"c,y\n', ["train.csv", "line 2", "quote"]),
    "NUL": ("train.csv", "text,label\na\0b,y\n", ["train.csv", "line 2", "NUL"]),
    "Latin-1": ("train.csv", b"text,label\na,x\ncaf\xe9,y\n", ["train.csv", "line 3", "byte 4", "0xe9", "UTF-8"]),
    "Latin-1, JSON": ("train.jsonl", b'{"text":"a","label":"x"}\n{"text":"\xe9"}\n', ["line 2", "0xe9", "UTF-8"]),
    "empty CSV": ("train.csv", "", ["train.csv", "empty"]),
    "empty JSONL": ("train.jsonl", "\n", ["train.jsonl", "empty"]),
    "header only": ("train.csv", "text,label\n", ["train.csv", "no rows"]),
    "double column": ("train.csv", "text,label,text\na,x,b\n", ["train.csv", "'text'", "2 times"]),
    "double key": ("train.jsonl", '{"text":"a","text":"b","label":"x"}\n', ["train.jsonl", "line 1", "twice"]),
    "lacking column": ("train.csv", "Text,label\na,x\n", ["train.csv", "no column 'text'", "did you mean 'Text'"]),
    "lacking key": ("train.jsonl", jsonl({"text": "a", "label": "x"}, {"text": "b"}), ["line 2", "'label'"]),
    "broken JSON": ("train.jsonl", '{"text":"a","label":"x"}\n\n{"text": b}\n', ["train.jsonl", "line 3", "column 10"]),
    "JSON array": ("train.json", '[{"text":"a","label":"x"}]\n', ["train.json", "line 1", "list", "one object a line"]),
    "nested JSON": ("train.jsonl", jsonl({"text": ["a"], "label": "x"}), ["line 1", "'text'", "list", "allowed"]),
    "half surrogate": ("train.jsonl", '{"text":"\\ud83d","label":"x"}\n', ["line 1", "'text'", "surrogate"]),
    "broken Parquet": ("train.parquet", b"PAR1 nothing", ["train.parquet", "not a readable Parquet"]),
    "empty text": ("train.csv", "text,label\na,x\n,y\n", ["train.csv", "row 2", "'text'", "is empty"]),
    "blank text": ("train.csv", "text,label\na,x\nb,y\n \u00a0\t,y\n", ["row 3", "'text'", "only whitespace"]),
    "empty label": ("train.csv", "text,label\na,x\nb,\n", ["train.csv", "row 2", "'label'", "is empty"]),
    "null": ("train.jsonl", jsonl({"text": "a", "label": "x"}, {"text": "b", "label": None}), ["row 2", "is null"]),
    "one class": ("train.csv", "text,label\na,x\nb,x\n", ["train.csv", "one class 'x'", "two"]),
    "too many classes": (
        "train.csv",
        "text,label\n" + "".join(f"a,{n}\n" for n in range(1001)),
        ["train.csv", "'label'", "1000", "data.label_column"],
    ),
}


@pytest.mark.parametrize(("name", "content", "parts"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file_is_refused_with_its_place(
    project: Project, refused: Refused, name: str, content: str | bytes, parts: list[str]
) -> None:
    project.write_params()
    project.write(f"data/in/{name}", content)
    line = refused(project)
    assert "cannot be read" not in line  # that is what is left to say where no check found the reason
    assert [part for part in parts if part not in line] == [], line


def test_parquet_with_damaged_pages_is_refused(project: Project, refused: Refused) -> None:
    project.write_params()
    path = project.folder / "data/in/train.parquet"
    parquet(path, text=["the cat"] * 40, label=["a", "b"] * 20)
    content = bytearray(path.read_bytes())
    content[4:60] = b"\xff" * 56
    path.write_bytes(content)
    assert "train.parquet: cannot be read" in refused(project)


# ---------------------------------------------------------------------------------------------- good input

ODD = [
    "None",
    "NA",
    "null",
    "1",
    "01",
    "1.0",
    "nan",
    "true",
    "2020-01-31",
    ' x "y" z ',
    "a\nb",
    "#",
    "\\N",
    "é€😀",
    "''",
]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".json", ".parquet"])
def test_text_cells_and_labels_are_read_exactly_as_typed(project: Project, suffix: str) -> None:
    project.write_params(data={"validation_size": 0.5})
    write_rows(project.folder / "data/in", suffix, [(text, text) for text in ODD for _ in range(2)])
    run_command(stage.main)
    for split in ("train", "validation"):
        assert raw(split)["text"] == ODD
        assert raw(split)["label"] == ODD


@pytest.mark.parametrize("name", ["train.csv", "train.jsonl"])
def test_byte_order_mark_is_no_part_of_the_first_column(project: Project, name: str) -> None:
    project.write_params(data={"label_names": ["b", "a"]})
    content = GOOD if name.endswith("csv") else jsonl({"text": "x", "label": "a"}, {"text": "y", "label": "b"})
    project.write(f"data/in/{name}", b"\xef\xbb\xbf" + content.encode())
    project.write("data/in/val.csv", GOOD)
    run_command(stage.main)
    assert raw("train")["label"][:2] == ["a", "b"]
