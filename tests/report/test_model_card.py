"""The model card, and that the lines it shows load the model in its folder."""

from __future__ import annotations

import ast
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stages.batches.tokenized import Task, save_task
from stages.config.read import parse_params, read_yaml
from stages.config.schema import ModelParams
from stages.data.features import Standardizer
from stages.modeling.build import build_model, save_model
from stages.modeling.head import decide, head_of
from stages.report.model_card import model_card
from stages.select_best import write_model
from tests.support.project import ROOT
from tests.support.report_input import CLASSIFICATION, FEATURES, HOSTILE, PIXELS, TASKS, hostile_input, report_input

ONE_LOGIT = "bce_with_logits"
STANDARDIZER = Standardizer(PIXELS, np.full(64, 2.0), np.full(64, 3.0))
any_task = pytest.mark.parametrize("name", TASKS)


def card_input(task: Task = CLASSIFICATION, loss: str = "", **params: Any) -> dict[str, Any]:
    source = report_input(task)
    merged = {section: source["params"].get(section, {}) | params.get(section, {}) for section in source["params"]}
    return {"best": source["best"], "task": task, "head": head_of(task, loss), "params": merged}


def front_matter(card: str) -> dict[str, Any]:
    _, header, _ = card.split("---\n", 2)
    parsed: dict[str, Any] = yaml.safe_load(header)
    return parsed


@pytest.mark.parametrize(
    ("source", "base_model"),
    [
        ("bert-base-cased", "bert-base-cased"),
        ("google/bert_uncased_L-2", "google/bert_uncased_L-2"),
        ("package:some_package/model", None),
        ("factory:module:callable", None),
        ("./models/mine", None),
        ("/home/me/models/mine", None),
        ("a/b\nlicense: mit", None),
    ],
)
def test_card_names_only_a_hub_id_as_base_model(source: str, base_model: str | None) -> None:
    card = model_card(**card_input(model={"source": source}))
    assert front_matter(card).get("base_model") == base_model
    assert set(front_matter(card)) <= {"library_name", "pipeline_tag", "tags", "metrics", "base_model"}
    assert "/home" not in card


@pytest.mark.parametrize("name", ["classification", "multi_label", "regression"])
def test_only_a_model_that_pipeline_loads_says_so(name: str) -> None:
    ours = front_matter(model_card(**card_input(TASKS[name])))
    assert (ours["library_name"], ours["pipeline_tag"]) == ("transformers", "text-classification")
    card = model_card(**card_input(TASKS[name], model={"source": "factory:module:callable"}))
    assert not {"library_name", "pipeline_tag"} & set(front_matter(card))
    assert "pipeline(" not in card


@any_task
@pytest.mark.parametrize("source", ["org/model", f"factory:module:{HOSTILE}"])
def test_hostile_names_cannot_break_card(source: str, name: str) -> None:
    given_input = hostile_input(name)
    params = given_input["params"] | {"model": {"source": source, "kwargs": {HOSTILE: HOSTILE}}}
    params["train"]["callbacks"] = [{"class": HOSTILE}]
    params["train"]["loss_kwargs"] = {HOSTILE: 1}
    task = given_input["task"]
    card = model_card(best=given_input["best"], task=task, head=head_of(task, ""), params=params)
    assert front_matter(card)["metrics"] == ["accuracy", "f1", HOSTILE]
    body = card.split("---\n", 2)[2]
    prose = re.sub(r"```python\n.*?\n```", "", body, flags=re.DOTALL)
    assert "`" not in re.sub(r"\\.|`[\w.]+`", "", prose), "no code but ours"
    assert not re.search(r"(?<!\\)<", prose), "no HTML"
    table = [line for line in body.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table} == {3, 4}
    assert not any(line.startswith("---") for line in body.splitlines())
    assert body.isprintable() or {c for c in body if not c.isprintable()} == {"\n"}
    assert "A" * 300 not in body and "x" * 300 not in body


@pytest.mark.parametrize("name", ["classification", "one logit"])
def test_hostile_names_of_two_classes_cannot_break_card(name: str) -> None:
    task = replace(CLASSIFICATION, label_names=(HOSTILE, "`x`"))
    loss = ONE_LOGIT if name == "one logit" else ""
    card = model_card(**card_input(task, loss, evaluate={"threshold": 0.3}))
    meaning = next(line for line in card.splitlines() if line.startswith("The path is"))
    assert "\\`x\\` where its probability is above 0.3" in meaning
    assert not re.search(r"(?<!\\)<", meaning)


def test_card_shows_both_splits_and_how_to_call_the_model() -> None:
    card = model_card(**card_input())
    assert "| accuracy | 0.9012 | 0.8012 |" in card
    assert '{"text": "First text.", "text_pair": "Second text."}' in card
    assert "`text` is premise, `text_pair` is hypothesis" in card
    assert "text_pair" not in model_card(**card_input(replace(CLASSIFICATION, text_columns=("review",))))


def test_card_shows_a_score_that_is_not_a_number_as_a_dash() -> None:
    given_input = card_input()
    given_input["best"]["validation"]["accuracy"] = float("nan")
    assert "| accuracy | — | 0.8012 |" in model_card(**given_input)


def test_card_lists_the_hyperparameters_that_are_set() -> None:
    callbacks = [{"class": "stages.custom.noise:GradientNoise", "kwargs": {"std": 0.01}}]
    train = {"loss": "huber", "loss_kwargs": {"delta": 2.0}, "callbacks": callbacks, "freeze": []}
    card = model_card(**card_input(FEATURES, train=train, data={"feature_columns": ["pixel_*"]}, model={"kwargs": {}}))
    assert "| train.loss | huber |" in card
    assert '| train.loss\\_kwargs | \\{"delta": 2.0\\} |' in card
    assert '"stages.custom.noise:GradientNoise", "kwargs": \\{"std": 0.01\\}' in card
    assert '| data.feature\\_columns | \\["pixel\\_\\*"\\] |' in card
    assert "train.freeze" not in card and "model.kwargs" not in card, "what is empty is left out"
    assert "tokens" not in card, "a feature model has none"
    plain = model_card(**card_input())
    assert "loss" not in plain.partition("## How it was trained")[2] and "feature" not in plain


def test_card_names_few_of_many_columns_and_labels() -> None:
    card = model_card(**card_input(FEATURES))
    assert "pixel\\_4, pixel\\_5 and 58 more.\n" in card.replace("\n\n", "\n")
    labels = replace(CLASSIFICATION, label_names=tuple(f"l{index}" for index in range(60)))
    assert "l48, l49 and 10 more." in model_card(**card_input(labels))


def run_lines(card: str) -> Any:
    """Run the card's Python and give the value of its last line."""
    (source,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    tree = ast.parse(source)
    last = tree.body.pop()
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {}
    exec(compile(tree, "card", "exec"), names)
    return eval(compile(ast.Expression(last.value), "card", "eval"), names)


def publish(task: Task, model: ModelParams, tiny_model: Path, loss: str | None = None) -> torch.nn.Module:
    """Lay out what select_best finds, with `model`'s weights as the candidate, and let it write models/best."""
    values = read_yaml(ROOT / "params.yaml")
    columns = {"text_columns": list(task.text_columns), "feature_columns": list(task.feature_columns)}
    values["data"] |= {"task": task.task, **columns}
    values["model"] = model.model_dump()
    values["train"] |= {"loss": loss}
    values["tokenize"] |= {"max_length": 16, "tokenizer": str(tiny_model) if task.text_columns else None}
    values["build_loaders"]["bucketing"] = "none"
    values["evaluate"] |= {"metrics": [task.kind.metrics[0]], "metric_for_best_model": "loss"}
    params = parse_params(values)
    tokenized, candidate, best = Path("data/tokenized"), Path("models/candidates/step-00000030"), Path("models/best")
    for folder in (tokenized, candidate, best):
        folder.mkdir(parents=True)
    save_task(tokenized, task)
    pretrained = None if model.source.startswith("factory:") else tiny_model
    made = build_model(model, pretrained, head_of(task, loss or ""), 0).eval()
    save_model(made, candidate, model)
    if task.text_columns:
        (tokenized / "tokenizer").mkdir()
        for path in tiny_model.glob("tokenizer*"):
            shutil.copy(path, tokenized / "tokenizer")
    else:
        STANDARDIZER.save(tokenized)
    write_model(best, report_input(task)["best"], task, params)
    return made


def tokens(tiny_model: Path, task: Task) -> dict[str, torch.Tensor]:
    """The inputs that the card's example makes."""
    from transformers import AutoTokenizer

    texts = ["First text.", "Second text."] if len(task.text_columns) == 2 else ["Some text."]
    made = AutoTokenizer.from_pretrained(tiny_model)(*texts, truncation=True, max_length=16, return_tensors="pt")
    return dict(made)


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("name", ["classification", "one logit", "multi_label", "regression"])
def test_the_cards_lines_give_what_the_model_says(
    name: str, columns: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = TASKS["classification" if name == "one logit" else name]
    task = replace(task, text_columns=task.text_columns[:columns])
    source = ModelParams(source=str(tiny_model), revision=None, kwargs={})
    model = publish(task, source, tiny_model, ONE_LOGIT if name == "one logit" else None)
    assert sorted(path.name for path in Path("models/best").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    with torch.no_grad():
        logits = model(**tokens(tiny_model, task)).logits.numpy()
    card = Path("models/best/README.md").read_text(encoding="utf-8")
    answer = run_lines(card)
    if name == "multi_label":
        assert set(answer) == {task.label_names[index] for index in np.flatnonzero(decide("multi_label", logits, 0.5))}
        assert "above 0.5 it was taken to apply" in card
        return
    (found,) = answer if isinstance(answer, list) else [answer]
    if name == "regression":
        assert found["score"] == pytest.approx(float(logits[0, 0]), abs=1e-6)
        assert "`score` is the predicted number" in card
    elif name == "one logit":
        assert found["label"] == "yes"
        assert found["score"] == pytest.approx(1 / (1 + np.exp(-float(logits[0, 0]))), abs=1e-6)
        assert "The answer is yes where its probability is above 0.5, else no; `score` is that probability." in card
    else:
        assert found["label"] == task.label_names[int(decide("classification", logits, 0.5)[0])]


def test_card_warns_that_the_pipeline_knows_no_threshold() -> None:
    card = model_card(**card_input(evaluate={"threshold": 0.3}))
    assert "The answer is yes where its probability is above 0.3, else no" in card
    assert "above 0.5" not in model_card(**card_input())


BAG_OF_WORDS = """
from torch import nn
class Bag(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.embedding, self.head = nn.Embedding(200, 8), nn.Linear(8, outputs)
    def forward(self, input_ids, attention_mask, token_type_ids=None):
        return {"logits": self.head(self.embedding(input_ids).mean(1))}
"""


@pytest.mark.parametrize("name", ["classification", "multi_label", "regression", "features"])
def test_the_cards_lines_load_a_factory_model(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("bag_of_words.py").write_text(BAG_OF_WORDS, encoding="utf-8")
    task = TASKS[name]
    frame = report_input(task)["validation"]
    outputs = head_of(task, "").outputs
    if name == "features":
        frame.drop(columns="logits").to_csv("new.csv", index=False)
        source, kwargs = "torch.nn:Linear", {"in_features": 64, "out_features": outputs}
        inputs = {"features.json"}
    else:
        source, kwargs = "bag_of_words:Bag", {"outputs": outputs}
        inputs = {"tokenizer.json", "tokenizer_config.json"}
    model = publish(task, ModelParams(source=f"factory:{source}", revision=None, kwargs=kwargs), tiny_model)
    best = {path.name for path in Path("models/best").iterdir()}
    assert best == {"README.md", "model.json", "model.safetensors", "task.json", *inputs}
    with torch.no_grad():
        logits = model(STANDARDIZER(frame)) if name == "features" else model(**tokens(tiny_model, task))["logits"]
    np.testing.assert_array_equal(
        run_lines(Path("models/best/README.md").read_text(encoding="utf-8")), decide(task.task, logits.numpy(), 0.5)
    )
