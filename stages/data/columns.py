"""Which columns are read of the data, and what each of them holds."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import datasets

from stages.config.schema import DataParams
from stages.ground.errors import UserError, quote
from stages.tasks.base import Kind

# Columns that the predictions add to the raw ones.
RESERVED = ("row", "key", "label", "prediction", "logits", "loss")


@dataclass(frozen=True)
class Columns:
    """The columns of a row: `inputs` are text, or float64 where `numeric`; the label is what `kind` asks for."""

    inputs: tuple[str, ...]
    label: str
    kind: Kind
    numeric: bool
    separator: str

    @property
    def names(self) -> list[str]:
        """The inputs, then the label."""
        return [*self.inputs, self.label]

    @property
    def features(self) -> datasets.Features:
        """Text, float64 or lists of text, as every source ends."""
        text, number = datasets.Value("string"), datasets.Value("float64")
        label = datasets.List(text) if self.kind.several else text if self.kind.has_classes else number
        return datasets.Features({**dict.fromkeys(self.inputs, number if self.numeric else text), self.label: label})


def choose(data: DataParams, found: Sequence[str], where: str) -> Columns:
    """What to read, given the columns `found` in the train split: the patterns in `data.feature_columns` spelled out.

    Raises:
        UserError: a column that is not there, a pattern that matches none, a column named twice, or a reserved name.
    """
    inputs = tuple(data.text_columns) or _expand(data, found, where)
    refuse_reserved(inputs, data.label_column)
    return Columns(inputs, data.label_column, data.kind, bool(data.feature_columns), data.label_separator)


def _expand(data: DataParams, found: Sequence[str], where: str) -> tuple[str, ...]:
    entries = data.feature_columns
    patterns = [entry for entry in entries if entry not in found and any(sign in entry for sign in "*?[")]
    require_columns(where, found, [entry for entry in entries if entry not in patterns])
    named_by: dict[str, str] = {}
    for entry in entries:
        matched = [entry]
        if entry in patterns:
            matched = [name for name in found if fnmatchcase(name, entry) and name != data.label_column]
        if not matched:
            raise UserError(
                f"{where}: no column matches {quote(entry)} in data.feature_columns; the columns are {listing(found)}"
            )
        for name in matched:
            if name in named_by:
                raise UserError(
                    f"{where}: column {quote(name)} is named by both {quote(named_by[name])} and {quote(entry)} "
                    "in data.feature_columns; let one of them name it"
                )
            named_by[name] = entry
    return tuple(named_by)


def refuse_reserved(inputs: Sequence[str], label: str) -> None:
    """Raise `UserError` if a column has a name that the predictions need."""
    # The label column goes by its own name beside row and key; the predictions call it label.
    for column, reserved in [*((name, RESERVED) for name in inputs), (label, RESERVED[:2])]:
        if column in reserved:
            raise UserError(
                f"column {quote(column)} of the data has a name that the predictions need for themselves "
                f"({', '.join(reserved)}); rename it in the data and in params.yaml"
            )


def listing(names: Sequence[str], limit: int = 20) -> str:
    """`names` as one line, cut to `limit` of them."""
    if not names:
        return "nothing"
    rest = len(names) - limit
    return ", ".join(map(quote, names[:limit])) + (f" and {rest} more" if rest > 0 else "")


def require_columns(where: str, found: Sequence[str], wanted: Sequence[str]) -> None:
    """Raise `UserError` if `wanted` names a column that `found` lacks, or `found` holds a name twice."""
    counts = Counter(found)
    for name, count in counts.items():
        if name.strip() and count > 1:
            raise UserError(f"{where}: the column name {quote(name)} occurs {count} times; rename them")
    for name in wanted:
        if name not in counts:
            by_lower = {name.lower().strip(): name for name in found}
            close = difflib.get_close_matches(name.lower(), by_lower, 1)
            hint = f"; did you mean {quote(by_lower[close[0]])}?" if close else ""
            raise UserError(
                f"{where}: no column {quote(name)}; the columns are {listing(found)}{hint} "
                "(named in data.text_columns, data.feature_columns and data.label_column)"
            )


def split_labels(cell: str, separator: str) -> list[str]:
    """The labels in a text cell of a multi_label column; none in an empty one."""
    return [name.strip() for name in cell.split(separator)] if cell.strip() else []
