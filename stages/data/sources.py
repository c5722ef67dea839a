"""Where the rows come from: files or the Hub, read with `datasets`; every split ends as columns of text."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from stages.config.errors import UserError, quote
from stages.config.params import DataParams
from stages.data import files
from stages.data.files import listing

BATCH_ROWS = 10_000
# What a Parquet or label column may hold: these have one obvious text.
SCALARS = ("string", "large_string", "string_view", "int", "uint", "float", "bool", "decimal", "null")


@dataclass(frozen=True)
class Source:
    """The splits as read: per split the text columns and the label column, all `string`.

    `where` names each split in error messages. A label is null in every row of an unlabelled Hub split.
    `class_names` is the Hub's (or Parquet's) own order of classes, None where it declares none.
    """

    splits: dict[str, datasets.Dataset]
    where: dict[str, str]
    class_names: list[str] | None
    hub: bool


def load_source(data: DataParams, cache: Path) -> Source:
    """Read all splits of `data`; what has to be converted is kept memory-mapped in the folder `cache`.

    Raises:
        UserError: anything about the data that the user has to mend, with file, line or row, and column.
    """
    return _load_hub(data, cache) if data.dataset is not None else _load_files(data, cache)


def _strings(columns: Sequence[str]) -> datasets.Features:
    return datasets.Features({column: datasets.Value("string") for column in columns})


def _columns(data: DataParams) -> list[str]:
    return [*data.text_columns, data.label_column]


def _load_files(data: DataParams, cache: Path) -> Source:
    found = files.find_files(Path(data.path).expanduser())
    splits: dict[str, datasets.Dataset] = {}
    class_names: list[str] | None = None
    for split, path in found.items():
        try:
            dataset = _load_file(path, _columns(data), cache / f"read-{split}")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
        names = _class_names(dataset, data.label_column)
        class_names = names if split == "train" else class_names
        splits[split] = _as_text(dataset, data, str(path), cache / f"text-{split}.arrow", hub=False)
    return Source(splits, {split: str(path) for split, path in found.items()}, class_names, hub=False)


def _load_file(path: Path, columns: list[str], cache: Path) -> datasets.Dataset:
    # datasets caches what it read by path and mtime; a private cache folder makes content alone decide.
    suffix = path.suffix.lower()
    data_files = {"train": [glob.escape(str(path.absolute()))]}
    expected: int | None = None
    try:
        if suffix in files.JSON_LINES:
            return datasets.Dataset.from_generator(
                files.json_rows,
                features=_strings(columns),
                # A tuple: datasets takes a list for shards to divide among readers.
                gen_kwargs={"path": str(path), "columns": tuple(columns)},
                cache_dir=str(cache),
                fingerprint="0" * 16,
            )
        if suffix == files.PARQUET:
            files.check_parquet(path, columns)
            return datasets.load_dataset(
                "parquet", data_files=data_files, split="train", columns=columns, cache_dir=str(cache)
            )
        expected = files.check_delimited(path, columns)
        dataset = datasets.load_dataset(
            "csv",
            data_files=data_files,
            split="train",
            cache_dir=str(cache),
            sep=files.DELIMITERS[suffix],
            usecols=columns,
            features=_strings(columns),
            # 'NA', 'null' and '1.0' are text like any other.
            keep_default_na=False,
            na_filter=False,
            encoding="utf-8-sig",
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{path}: cannot be read: {quote(str(error.__cause__ or error), 160)}") from None
    if dataset.num_rows != expected:
        raise RuntimeError(f"{path}: the check counted {expected} rows, but {dataset.num_rows} were read")
    return dataset


def _load_hub(data: DataParams, cache: Path) -> Source:
    assert data.dataset is not None
    name = data.dataset + (f" ({data.config})" if data.config else "")
    if Path(data.dataset).exists() or data.dataset in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise UserError(f"data.dataset is {quote(data.dataset)}, which is no Hub id; name local files in data.path")
    try:
        loaded = datasets.load_dataset(data.dataset, data.config, revision=data.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"Hub dataset {quote(name)}: {_hub_reason(error)}") from None
    splits: dict[str, datasets.Dataset] = {}
    where: dict[str, str] = {}
    for hub_split, dataset in loaded.items():
        split = files.SPLIT_OF.get(str(hub_split))
        if split is None:
            continue
        if split in splits:
            raise UserError(f"{where[split]}: {hub_split} is a {split} split as well; use a copy that has one of them")
        where[split] = f"Hub dataset {quote(name)}, split {hub_split}"
        splits[split] = _load_hub_split(dataset, data, where[split], cache / f"text-{split}.arrow")
    if "train" not in splits:
        raise UserError(f"Hub dataset {quote(name)}: no train split; it has {listing([str(key) for key in loaded])}")
    return Source(splits, where, _class_names(loaded["train"], data.label_column), hub=True)


def _hub_reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "scripts are no longer supported" in text:
        return "it needs its own Python code to load, which is never run; use a copy in Parquet, or files in data.path"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError | OSError):
        return f"not found, or the Hub cannot be reached ({text[:200]}); local files are read with data.path instead"
    return f"cannot be loaded ({text[:300]}); check data.config and data.revision, or use local files in data.path"


def _load_hub_split(dataset: datasets.Dataset, data: DataParams, where: str, cache: Path) -> datasets.Dataset:
    files.require_columns(where, dataset.column_names, _columns(data))
    if not dataset.num_rows:
        raise UserError(f"{where}: no rows")
    for column in data.text_columns:
        feature = dataset.features[column]
        if not isinstance(feature, datasets.Value) or "string" not in feature.dtype:
            raise UserError(f"{where}: column {quote(column)} is {_kind(feature)}; data.text_columns must hold text")
    return _as_text(dataset, data, where, cache, hub=True)


def _kind(feature: object) -> str:
    return feature.dtype if isinstance(feature, datasets.Value) else quote(feature, 60)


def _class_names(dataset: datasets.Dataset, column: str) -> list[str] | None:
    feature = dataset.features[column]
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _as_text(dataset: datasets.Dataset, data: DataParams, where: str, cache: Path, *, hub: bool) -> datasets.Dataset:
    """`dataset` with the wanted columns alone, all of them `string`; class ids become names."""
    columns = _columns(data)
    dataset = dataset.select_columns(columns)
    if dataset.features == _strings(columns):
        return dataset
    for column in data.text_columns:
        _require_scalar(dataset.features[column], where, column)
    labels = _label_reader(dataset, data.label_column, where, hub=hub)

    def as_text(table: pa.Table) -> pa.Table:
        texts = {column: pc.cast(table[column], pa.string()) for column in data.text_columns}
        return pa.table({**texts, data.label_column: labels(table[data.label_column])})

    return (
        dataset.with_format("arrow")
        .map(
            as_text,
            batched=True,
            batch_size=BATCH_ROWS,
            features=_strings(columns),
            cache_file_name=str(cache),
            load_from_cache_file=False,
            new_fingerprint="0" * 16,
            desc=f"reading {where}",
        )
        .with_format(None)
    )


def _require_scalar(feature: object, where: str, column: str) -> None:
    if not isinstance(feature, datasets.Value) or not feature.dtype.startswith(SCALARS):
        raise UserError(
            f"{where}: column {quote(column)} is {_kind(feature)}; allowed are text, numbers and true or false"
        )


def _label_reader(
    dataset: datasets.Dataset, column: str, where: str, *, hub: bool
) -> Callable[[pa.ChunkedArray], pa.ChunkedArray]:
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        names = pa.array(feature.names, pa.string())

        def name_of(ids: pa.ChunkedArray) -> pa.ChunkedArray:
            known = pc.and_(pc.greater_equal(ids, 0), pc.less(ids, len(names)))
            return pc.take(names, pc.if_else(known, ids, None))

        return name_of
    _require_scalar(feature, where, column)
    # The Hub's convention for a test split whose labels are kept secret. A lone -1 may be a class of its own.
    if hub and "int" in feature.dtype and pc.all(pc.equal(dataset.data.column(column), -1)).as_py():
        return lambda ids: pa.chunked_array([pa.nulls(len(ids), pa.string())])
    return lambda values: pc.cast(values, pa.string())
