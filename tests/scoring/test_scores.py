"""Scores of the user's own functions and modules: they work, or one line says why not."""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stages.ground.errors import UserError
from stages.scoring import scores as scoring
from stages.scoring.scores import score
from tests.support.tasks import make_params, make_task

TASK = make_task("classification", 2)
LOGITS = np.array([[0, 1], [0, 2], [1, 0], [0, 3]], np.float32)
LABELS = np.array([1, 1, 1, 0])
MODULE = """
import datasets
import evaluate

class Own(evaluate.Metric):
    def _info(self):
        value = datasets.Value("int64")
        return evaluate.MetricInfo(
            description="", citation="", inputs_description="",
            features=datasets.Features({"predictions": value, "references": value}),
        )

    def _compute(self, predictions, references):
        return RESULT
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Writes a module `own_metrics` of the user's, whose `compute` returns what the text says."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def write(result: str) -> None:
        text = f"import numpy as np\nimport torch\n\ndef compute(found):\n    return {result}\n"
        (tmp_path / "own_metrics.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, "own_metrics", raising=False)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)

    return write


def write_module(folder: Path, result: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{folder.name}.py").write_text(MODULE.replace("RESULT", result), encoding="utf-8")


def test_own_function_gets_what_the_trainer_gives_it(own: Callable[[str], None]) -> None:
    own(
        "{'sum': found.predictions.sum(), 'float32': found.predictions.dtype == np.float32,"
        " 'rows': len(found.label_ids), 'half': torch.tensor(0.5), 'zero': np.array(0),"
        " 'mark': (found.predictions.fill(9), 1)[1]}"
    )
    logits = LOGITS.copy()
    found = score(TASK, make_params("accuracy", "own_metrics:compute", best="half"), logits, LABELS)
    assert found == {"accuracy": 0.5, "sum": 7.0, "float32": 1.0, "rows": 4.0, "half": 0.5, "zero": 0.0, "mark": 1.0}
    assert all(type(value) is float for value in found.values())
    # What the function did to its own copy is not seen.
    assert (logits == LOGITS).all()


def test_own_function_gets_one_output_and_float_labels_as_they_are(own: Callable[[str], None]) -> None:
    own("{'outputs': found.predictions.shape[1], 'float': found.label_ids.dtype == np.float32}")
    labels = np.array([0.5, 1, 2, 3], np.float32)
    found = score(make_task("regression"), make_params("own_metrics:compute"), LOGITS[:, :1], labels)
    assert found == {"outputs": 1.0, "float": 1.0}


@pytest.mark.parametrize("entry", ["metrics/mine", "./metrics/mine/", "metrics/mine/mine.py", "{folder}/metrics/mine"])
def test_own_module_gets_decisions(entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_module(tmp_path / "metrics/mine", "{'chosen': sum(predictions), 'true': sum(references)}")
    entry = entry.format(folder=tmp_path)
    path = list(sys.path)
    assert score(TASK, make_params(entry), LOGITS, LABELS) == {"chosen": 3.0, "true": 3.0}
    assert score(TASK, make_params(entry, threshold=0.9), LOGITS, LABELS) == {"chosen": 1.0, "true": 3.0}
    assert sys.path == path


def test_own_module_gets_whole_numbers_in_multi_label(tmp_path: Path) -> None:
    write_module(tmp_path / "rows", "{'true': sum(map(sum, references)), 'chosen': sum(map(sum, predictions))}")
    script = tmp_path / "rows/rows.py"
    row = 'datasets.Sequence(datasets.Value("int32"))'
    script.write_text(script.read_text().replace('datasets.Value("int64")', row))
    labels = np.array([[0, 1]] * 4, np.float32)
    found = score(make_task("multi_label", 2), make_params(str(tmp_path / "rows")), LOGITS, labels)
    assert found == {"true": 4.0, "chosen": 4.0}


def test_modules_with_the_same_name_are_told_apart(tmp_path: Path) -> None:
    folders = [tmp_path / "a/mine", tmp_path / "b/mine"]
    for folder in folders:
        write_module(folder, f"{{'#{folder.parent.name}': 1}}")
    found = score(TASK, make_params(*map(str, folders)), LOGITS, LABELS)
    assert list(found) == ["#a", "#b"]


def test_modules_load_with_the_temporary_folder_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tempfile.gettempdir())
    write_module(tmp_path / "mine", "{'a': 1}")
    assert score(TASK, make_params(str(tmp_path / "mine")), LOGITS, LABELS) == {"a": 1.0}


def test_an_edited_module_is_read_again(tmp_path: Path) -> None:
    # To `evaluate` what follows a # is a comment, which makes no difference.
    for result in ("{'#1': 1}", "{'#2': 1}"):
        write_module(tmp_path / "mine", result)
        scoring._load.cache_clear()
        assert score(TASK, make_params(str(tmp_path / "mine")), LOGITS, LABELS) == {result[2:4]: 1.0}


def test_draws_of_a_module_do_not_depend_on_earlier_ones_nor_change_later_ones(tmp_path: Path) -> None:
    write_module(tmp_path / "mine", "{'drawn': __import__('numpy').random.random()}")
    drawn = []
    for seed in (1, 2):
        scoring._load.cache_clear()
        np.random.seed(seed)
        drawn.append(score(TASK, make_params(str(tmp_path / "mine")), LOGITS, LABELS))
        after = np.random.random()
        np.random.seed(seed)
        assert after == np.random.random()
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("1 / 0", "evaluate.metrics: 'own_metrics:compute' raised ZeroDivisionError: division by zero"),
        ("found.nothing", "raised AttributeError: 'EvalPrediction' object has no attribute 'nothing'"),
        ("int('a\\nb')", "raised ValueError: invalid literal"),
        ("[1.0]", "returned [1.0]; it should be a dict of name: number"),
        ("None", "returned None; it should be a dict of name: number"),
        ("{1: 1.0}", "gives 1; a name should be printable text"),
        ("{'a\\tb': 1.0}", "gives 'a\\tb'; a name should be printable text"),
        ("{'a\\nb': 1.0}", "gives 'a\\nb'; a name should be printable text"),
        ("{'': 1.0}", "gives ''; a name should be printable text"),
        ("{'a': '1.0'}", "gives 'a': '1.0'; it should be a number"),
        ("{'a': None}", "gives 'a': None; it should be a number"),
        ("{'a': np.array('1')}", "gives 'a': array('1', dtype='<U1'); it should be a number"),
        ("{'a': np.ones(1)}", "gives 'a': array([1.]); it should be a number"),
        ("{'a': torch.ones(2)}", "gives 'a': tensor([1., 1.]); it should be a number"),
        ("{'step': 1.0}", "gives 'step', which is reserved; give it another name"),
        ("{'epoch': 1.0}", "gives 'epoch', which is reserved; give it another name"),
        ("{'loss': 1.0}", "gives 'loss', which is reserved; give it another name"),
        ("{'accuracy': 1.0}", "gives 'accuracy', which is there already; give it another name"),
    ],
)
def test_own_function_that_is_wrong_gets_one_line(own: Callable[[str], None], result: str, message: str) -> None:
    own(result)
    with pytest.raises(UserError) as error:
        score(TASK, make_params("accuracy", "own_metrics:compute"), LOGITS, LABELS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("result", ["{'accuracy': 1.0}", "{'loss': 1.0}"])
def test_a_known_metric_after_an_own_one_of_its_name_is_refused(own: Callable[[str], None], result: str) -> None:
    own(result)
    with pytest.raises(UserError, match=r"which is (there already|reserved); give it another name"):
        score(TASK, make_params("own_metrics:compute", "accuracy"), LOGITS, LABELS)


def test_best_metric_that_nobody_gives_is_refused(own: Callable[[str], None]) -> None:
    own("{'a': 1, 'b': 2}")
    with pytest.raises(UserError) as error:
        score(TASK, make_params("accuracy", "own_metrics:compute", best="c"), LOGITS, LABELS)
    assert str(error.value) == (
        "evaluate.metric_for_best_model is 'c', which evaluate.metrics do not give; there are loss, accuracy, a, b"
    )


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("own_metrics:nothing", "module 'own_metrics' has no attribute 'nothing'"),
        ("no_such_module:compute", "No module named 'no_such_module'"),
    ],
)
def test_function_that_is_not_there(own: Callable[[str], None], entry: str, message: str) -> None:
    own("{}")
    with pytest.raises(UserError, match=message):
        score(TASK, make_params(entry), LOGITS, LABELS)


@pytest.mark.parametrize("entry", ["no/such", "./accuracy", "empty/", "metrics/none.py"])
def test_module_that_is_not_there_is_not_looked_for_elsewhere(
    entry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(scoring, "_load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(UserError) as error:
        score(TASK, make_params(entry), LOGITS, LABELS)
    expected = tmp_path / ("empty/empty.py" if entry == "empty/" else entry)
    assert str(error.value) == f"evaluate.metrics names {entry!r}, but {expected} is not there"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("X = 1\n", "defines no evaluate.Metric"),
        ("import no_such_package\n", "raised ImportError: To be able to use mine, you need to install"),
        ("def f(:\n", "raised SyntaxError: invalid syntax"),
        (MODULE.replace("RESULT", "[1]"), "returned [1]; it should be a dict of name: number"),
        (MODULE.replace("RESULT", "1 / 0"), "raised ZeroDivisionError: division by zero"),
        (MODULE.replace('"int64"', '"string"').replace("RESULT", "{}"), "raised ValueError: Predictions and/or"),
    ],
)
def test_module_that_is_wrong_gets_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    path = list(sys.path)
    with pytest.raises(UserError) as error:
        score(TASK, make_params(str(tmp_path / "mine.py")), LOGITS, LABELS)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert sys.path == path


def test_a_known_metric_that_cannot_answer_gets_one_line() -> None:
    logits = np.full((4, 1), np.nan, np.float32)
    with pytest.raises(UserError, match=r"evaluate\.metrics: 'mse' raised ValueError: Input contains NaN"):
        score(make_task("regression"), make_params("mse"), logits, np.ones(4, np.float32))


def test_own_values_may_be_any_kind_of_number(own: Callable[[str], None]) -> None:
    own("{'a': True, 'b': np.float16(0.5), 'c': torch.tensor(2, dtype=torch.bfloat16), 'd': float('nan')}")
    found = score(TASK, make_params("own_metrics:compute"), LOGITS, LABELS)
    assert [found["a"], found["b"], found["c"]] == [1.0, 0.5, 2.0]
    assert math.isnan(found["d"])
