"""Where the rows come from: files or the Hub, read with `datasets`; every split ends as columns of known types."""

from __future__ import annotations

import difflib
import glob
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from stages.config.schema import DataParams
from stages.data import files
from stages.data.columns import Columns, choose, listing, require_columns
from stages.data.kept import Keeper, Made
from stages.data.numbers import is_text_type
from stages.data.origin import Origin
from stages.data.splits import PLAIN, SPLIT_OF, find_files
from stages.data.tables import batch_rows, batches, map_tables
from stages.data.typed import as_typed, class_names_of, kind_of, nulls
from stages.ground.disk import sha256_file
from stages.ground.errors import TransientError, UserError, is_unreachable, quote


@dataclass(frozen=True)
class Source:
    """The splits as read: per split the columns in `columns`, of the types in `columns.features`.

    `where` names each split's rows in messages. A label is null in every row of an unlabelled Hub split, and of the
    local ones in `unlabelled`. `remarks` are lines that say what was decided.
    `class_names` is the Hub's (or Parquet's) own order of classes, None where it declares none.
    `version` is another one where anything that was read is another.
    """

    splits: dict[str, datasets.Dataset]
    where: dict[str, Origin]
    columns: Columns
    class_names: list[str] | None
    hub: bool
    version: str
    unlabelled: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


def load_source(data: DataParams, keeper: Keeper) -> Source:
    """Read all splits of `data`, memory-mapped; each file, or split of the Hub, is kept once it is read.

    Raises:
        UserError: anything about the data that the user has to mend, with file, line or row, and column.
    """
    return _load_hub(data, keeper) if data.dataset is not None else _load_files(data, keeper)


def _load_files(data: DataParams, keeper: Keeper) -> Source:
    found = find_files(Path(data.path))
    remarks = [f"{data.path}: left aside: {listing(found.left_aside)}"] if found.left_aside else []
    train = found.splits["train"][0]
    with _read(train):
        columns = choose(data, files.header(train), str(train))
    splits: dict[str, datasets.Dataset] = {}
    where: dict[str, Origin] = {}
    class_names: list[str] | None = None
    unlabelled, version = set(), hashlib.sha256()
    for split in sorted(found.splits, key=lambda split: split != "train"):
        paths = found.splits[split]
        lacks_label = split == "test" and _lacks_label(paths, columns)
        names = list(columns.inputs) if lacks_label else columns.names
        may_lack = split == "test" and not lacks_label
        read = [_kept(keeper, split, path, columns, names, may_lack) for path in paths]
        why = f"no column {quote(columns.label)}" if lacks_label else None
        if may_lack and all(facts["blank"] for _, facts in read):
            why = f"column {quote(columns.label)} is empty in every row"
        elif any(facts["blank"] for _, facts in read):
            read = [_kept(keeper, split, path, columns, names, False) for path in paths]
        parts = []
        secret = split == "test" and why is None
        for number, (dataset, facts) in enumerate(read):
            version.update(f"{split} {facts['sha256']} ".encode())
            if split == "train" and not number:
                class_names = facts["class_names"]
            # An id that stands for no class becomes null; a cell that is null is a mistake.
            secret = secret and facts["class_names"] is not None and facts["secret"]
            parts.append(dataset.select_columns(columns.names))
        splits[split] = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
        where[split] = Origin([(str(path), part.num_rows) for path, part in zip(paths, parts, strict=True)])
        if len(parts) > 1 or (Path(data.path).is_dir() and paths[0].stem not in PLAIN):
            remarks.append(f"{split}: {listing([str(path) for path in paths])}")
        if split == "test" and why is None and (secret or _is_secret(splits, columns)):
            why = f"column {quote(columns.label)} is -1 in every row, and in no row of train"
            make = partial(_without_labels, splits[split], columns)
            splits[split] = keeper.kept(f"secret-{version.hexdigest()[:16]}", make)[0]
        if why:
            unlabelled.add(split)
            remarks.append(f"{where[split]}: {why}, so that its rows are predicted, and not scored")
    return Source(
        splits, where, columns, class_names, False, version.hexdigest()[:16], frozenset(unlabelled), tuple(remarks)
    )


def _kept(keeper: Keeper, split: str, path: Path, columns: Columns, names: Sequence[str], may_lack: bool) -> Made:
    """A file as it is read, once. `may_lack`: where the label is empty in every row, there is none."""
    with _read(path):
        digest = sha256_file(path)
        scope = f"read-{split}-{digest[:16]}" + "-may-lack" * may_lack
        dataset, facts = keeper.kept(scope, partial(_load_typed, path, columns, names, may_lack))
    return dataset, facts | {"sha256": digest}


def _load_typed(path: Path, columns: Columns, names: Sequence[str], may_lack: bool, cache: Path) -> Made:
    """A file's rows, its classes where it declares some, and whether the label is empty, or -1, in every row then."""
    dataset = _load_file(path, columns, names, cache / "read")
    class_names = class_names_of(dataset, columns.label) if columns.label in dataset.column_names else None
    secret = class_names is not None and not columns.kind.several and _holds(dataset, columns, -1)
    blank = may_lack and _is_blank(dataset, columns)
    found = dataset.select_columns(list(columns.inputs)) if blank else dataset
    typed = as_typed(found, columns, str(path), cache / "typed.arrow", hub=False)
    return typed, {"class_names": class_names, "secret": secret, "blank": blank}


@contextmanager
def _read(path: Path) -> Iterator[None]:
    """What keeps `path` from being read becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except files.UNPACKING_ERRORS as error:
        raise UserError(f"{path}: cannot be unpacked ({error}); pack it again") from None


def _lacks_label(paths: Sequence[Path], columns: Columns) -> bool:
    """Whether none of the test files has the label column; one whose name is nearly the same may be a slip."""
    headers = []
    for path in paths:
        with _read(path):
            headers.append(files.header(path))
    if any(columns.label in header for header in headers):
        return False
    wanted = columns.label.lower().strip()
    return not any(difflib.get_close_matches(wanted, [name.lower().strip() for name in header]) for header in headers)


def _is_blank(dataset: datasets.Dataset, columns: Columns) -> bool:
    """Whether no row has a label: null, the NaN that pandas writes for that, or text of nothing but whitespace."""
    for table in batches(dataset, [columns.label]):
        values = table[columns.label]
        blank = pc.is_null(values, nan_is_null=True)
        if is_text_type(values.type):
            blank = pc.or_(blank, pc.fill_null(pc.equal(pc.utf8_trim_whitespace(values), ""), False))
        if not pc.all(blank).as_py():
            return False
    return True


def _holds(dataset: datasets.Dataset, columns: Columns, label: object) -> bool:
    """Whether each label is this one."""
    return bool(pc.all(pc.fill_null(pc.equal(dataset.data.column(columns.label), label), False)).as_py())


def _is_secret(splits: dict[str, datasets.Dataset], columns: Columns) -> bool:
    """Whether each label of the test split is the Hub's -1 for a secret one, and -1 is no label in train."""
    if columns.kind.several:
        return False

    def is_secret(split: str) -> Iterator[pa.ChunkedArray]:
        values = pa.array(["-1", "-1.0"] if columns.kind.has_classes else [-1.0])
        for table in batches(splits[split], [columns.label]):
            yield pc.is_in(table[columns.label], value_set=values)

    return all(pc.all(found).as_py() for found in is_secret("test")) and not any(
        pc.any(found).as_py() for found in is_secret("train")
    )


def _without_labels(dataset: datasets.Dataset, columns: Columns, cache: Path) -> Made:
    def without(table: pa.Table, _: int) -> pa.Table:
        return table.set_column(
            table.column_names.index(columns.label), columns.label, nulls(table[columns.label], columns)
        )

    return map_tables(dataset, without, columns.features, cache / "secret.arrow", "reading"), {}


def _load_file(path: Path, columns: Columns, names: Sequence[str], cache: Path) -> datasets.Dataset:
    # datasets caches what it read by path and mtime; a private cache folder makes content alone decide.
    suffix = files.suffix_of(path)
    data_files = {"train": [glob.escape(str(path.absolute()))]}
    text = datasets.Value("string")
    expected: int | None = None
    try:
        if suffix in files.JSON_LINES:
            label = columns.features[columns.label] if columns.kind.several else text
            return datasets.Dataset.from_generator(
                files.json_rows,
                features=datasets.Features({name: label if name == columns.label else text for name in names}),
                gen_kwargs={"path": str(path), "columns": columns, "names": tuple(names)},
                cache_dir=str(cache),
                fingerprint="0" * 16,
            )
        if suffix == files.PARQUET:
            files.check_parquet(path, names)
            return datasets.load_dataset(
                "parquet",
                data_files=data_files,
                split="train",
                columns=list(names),
                cache_dir=str(cache),
                keep_in_memory=False,
            )
        expected = files.check_delimited(path, names)
        if path.suffix.lower() in files.UNPACKED_BY:
            # datasets would keep what it unpacks, by path and mtime, outside of the project.
            data_files = {"train": [glob.escape(str(files.unpack(path, cache.with_suffix(suffix)).absolute()))]}
        dataset = datasets.load_dataset(
            "csv",
            data_files=data_files,
            split="train",
            cache_dir=str(cache),
            keep_in_memory=False,
            sep=files.DELIMITERS[suffix],
            usecols=list(names),
            features=datasets.Features(dict.fromkeys(names, text)),
            chunksize=batch_rows(len(names)),
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


def _load_hub(data: DataParams, keeper: Keeper) -> Source:
    assert data.dataset is not None
    name = data.dataset + (f" ({data.config})" if data.config else "")
    if Path(data.dataset).exists() or data.dataset in datasets.packaged_modules._PACKAGED_DATASETS_MODULES:
        raise UserError(f"data.dataset is {quote(data.dataset)}, which is no Hub id; name local files in data.path")
    try:
        loaded = datasets.load_dataset(data.dataset, data.config, revision=data.revision)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        kind = TransientError if is_unreachable(error) else UserError
        raise kind(f"Hub dataset {quote(name)}: {_hub_reason(error)}") from None
    if "train" not in loaded:
        raise UserError(f"Hub dataset {quote(name)}: no train split; it has {listing([str(key) for key in loaded])}")
    columns = choose(data, loaded["train"].column_names, f"Hub dataset {quote(name)}, split train")
    splits: dict[str, datasets.Dataset] = {}
    where: dict[str, Origin] = {}
    left: list[str] = []
    version = hashlib.sha256()
    for hub_split, dataset in loaded.items():
        split = SPLIT_OF.get(str(hub_split))
        if split is None:
            left.append(str(hub_split))
            continue
        if split in splits:
            raise UserError(f"{where[split]}: {hub_split} is a {split} split as well; use a copy that has one of them")
        where[split] = Origin([(f"Hub dataset {quote(name)}, split {hub_split}", dataset.num_rows)])
        # Of a dataset of the Hub, which is cached by its commit, this names the content.
        version.update(f"{split} {dataset._fingerprint} ".encode())
        make = partial(_load_hub_split, dataset, columns, str(where[split]))
        splits[split] = keeper.kept(f"read-{split}-{dataset._fingerprint}", make)[0].select_columns(columns.names)
    remarks = (f"Hub dataset {quote(name)}: left aside: split {listing(left)}",) if left else ()
    class_names = class_names_of(loaded["train"], data.label_column)
    return Source(splits, where, columns, class_names, True, version.hexdigest()[:16], remarks=remarks)


def _hub_reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if "scripts are no longer supported" in text:
        return "it needs its own Python code to load, which is never run; use a copy in Parquet, or files in data.path"
    if isinstance(error, datasets.exceptions.DatasetNotFoundError | OSError):
        return f"not found, or the Hub cannot be reached ({text[:200]}); local files are read with data.path instead"
    return f"cannot be loaded ({text[:300]}); check data.config and data.revision, or use local files in data.path"


def _load_hub_split(dataset: datasets.Dataset, columns: Columns, where: str, cache: Path) -> Made:
    require_columns(where, dataset.column_names, columns.names)
    if not dataset.num_rows:
        raise UserError(f"{where}: no rows")
    for column in () if columns.numeric else columns.inputs:
        feature = dataset.features[column]
        if not isinstance(feature, datasets.Value) or "string" not in feature.dtype:
            raise UserError(f"{where}: column {quote(column)} is {kind_of(feature)}; data.text_columns must hold text")
    return as_typed(dataset, columns, where, cache / "typed.arrow", hub=True), {}
