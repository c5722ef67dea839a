"""What public reports and an attack found of what a loaded model brings, compared with tokenizer and data.

An input a row, and the line or the value that is right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from stages.batches.tokenized import Task
from stages.config.schema import ModelParams
from stages.modeling.build import build_model, save_model
from stages.modeling.head import head_of
from tests.support.project import line_of
from tests.support.reports import HEAD, NAMES, trained, without

# What a loaded model brings is compared with tokenizer and data.


def classes(*names: str, task: str = "classification", loss: str = "") -> Any:
    return head_of(Task(task, names, ("text",), (), "label", ("input_ids",)), loss)


TOKENS = torch.arange(5, 25).reshape(4, 5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


@pytest.mark.parametrize(
    ("changes", "head", "order"),
    [
        ({}, classes(*NAMES), [0, 1, 2]),
        ({}, classes("positive", "negative", "neutral"), [2, 0, 1]),
        ({}, classes("Positive", "NEGATIVE ", "neutral"), [2, 0, 1]),
        ({"problem_type": "single_label_classification"}, classes("positive", "neutral", "negative"), [2, 1, 0]),
        ({"problem_type": "multi_label_classification"}, classes(*NAMES[::-1], task="multi_label"), [2, 1, 0]),
        ({"id2label": {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}}, classes("c", "b", "a"), [0, 1, 2]),
        ({"id2label": {0: "a", 1: "A", 2: "b"}}, classes("A", "b", "a"), [1, 2, 0]),
        ({"id2label": {0: "2", 1: "0", 2: "1"}}, classes("0", "1", "2"), [1, 2, 0]),
        ({}, classes("0", "1", "2"), [0, 1, 2]),
    ],
)
def test_head_with_the_same_labels_is_put_into_the_order_of_the_data(
    changes: dict[str, Any], head: Any, order: list[int], tiny_model: Path, tmp_path: Path
) -> None:
    before = trained(tiny_model, tmp_path / "model", **changes)
    said: list[str] = []
    params = ModelParams(source="model", revision=None, kwargs={})
    model = build_model(params, tmp_path / "model", head, 0, None, said.append)
    torch.testing.assert_close(logits(model), logits(before)[:, order])
    assert [("in the order" in line) for line in said] == [True] * (order != [0, 1, 2])


@pytest.mark.parametrize(
    ("kind", "changes", "head", "expected"),
    [
        (None, {}, classes("a", "b"), "its head has 3 outputs, and 2 are needed"),
        (None, {}, classes(*NAMES, "mixed"), "its head has 3 outputs, and 4 are needed"),
        (None, {}, classes("a", "b", loss="bce_with_logits"), "its head has 3 outputs, and 1 are needed"),
        (None, {}, classes(task="regression"), "its head has 3 outputs, and 1 are needed"),
        (None, {}, classes("red", "green", "blue"), "its head knows the labels 'negative, neutral, positive', and the"),
        (
            None,
            {"problem_type": "single_label_classification"},
            classes(*NAMES, task="multi_label"),
            "its head is one for single_label_classification, and multi_label_classification is needed",
        ),
        (
            None,
            {"problem_type": "regression", "id2label": {0: "LABEL_0"}},
            classes("a", "b", loss="bce_with_logits"),
            "its head is one for regression",
        ),
        (None, {"id2label": {0: "bad"}}, classes("bad", "good", loss="bce_with_logits"), "knows the labels 'bad'"),
        (AutoModelForTokenClassification, {}, classes(*NAMES), "its head is that of a BertForTokenClassification"),
    ],
)
def test_head_of_another_size_or_task_gives_way_to_a_new_one_and_the_encoder_stays(
    kind: Any, changes: dict[str, Any], head: Any, expected: str, tiny_model: Path, tmp_path: Path
) -> None:
    before = trained(tiny_model, tmp_path / "model", kind or AutoModelForSequenceClassification, **changes).state_dict()
    params = ModelParams(source="model", revision=None, kwargs={})
    said: list[str] = []
    model = build_model(params, tmp_path / "model", head, 0, None, said.append)
    line = said[-1]  # that of tokens has no pooler, which another line says
    assert expected in line and line.endswith("the head is a new one, and the encoder stays")
    found = model.state_dict()
    assert all(torch.equal(found[name], before[name]) for name in found if name in before and "encoder" in name)
    assert found["classifier.weight"].shape[0] == head.outputs
    assert found["classifier.weight"].std() < 0.1, "as a new one is initialised"
    again = build_model(params, tmp_path / "model", head, 0).state_dict()
    other = build_model(params, tmp_path / "model", head, 1).state_dict()
    assert torch.equal(again["classifier.weight"], found["classifier.weight"])
    assert not torch.equal(other["classifier.weight"], found["classifier.weight"])


@pytest.mark.parametrize("part", ["classifier.bias", "classifier.weight"])
def test_half_a_head_gives_way_to_a_new_one(tiny_model: Path, tmp_path: Path, part: str) -> None:
    trained(tiny_model, tmp_path / "model")
    without(part)(tmp_path / "model")
    said: list[str] = []
    params = ModelParams(source="model", revision=None, kwargs={})
    model = build_model(params, tmp_path / "model", classes(*NAMES), 0, None, said.append)
    assert f"its folder lacks {part}; the head is a new one" in said[0]
    assert not model.state_dict()["classifier.bias"].any() and model.state_dict()["classifier.weight"].std() < 0.1


def test_method_of_a_config_is_no_setting(tiny_model: Path) -> None:
    params = ModelParams(source="tiny", revision=None, kwargs={"to_dict": 1})
    assert "'to_dict' is no setting of BertConfig" in line_of(lambda: build_model(params, tiny_model, HEAD, 0))


def test_model_without_a_head_is_built_without_a_word_and_as_ever(tiny_model: Path) -> None:
    said: list[str] = []
    params = ModelParams(source="tiny", revision=None, kwargs={})
    model = build_model(params, tiny_model, HEAD, 3, 0, said.append)
    torch.manual_seed(3)
    expected = AutoModelForSequenceClassification.from_pretrained(tiny_model, **HEAD.config).state_dict()
    assert said == []
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_pad_token_of_the_tokenizer_counts(tmp_path: Path) -> None:
    """GPT-2's head reads the last token that is no padding: by another pad token that is another one."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    settings = GPT2Config(vocab_size=30, n_positions=16, n_embd=8, n_layer=1, n_head=1, pad_token_id=2)
    GPT2ForSequenceClassification(settings).save_pretrained(tmp_path / "model")
    params = ModelParams(source="model", revision=None, kwargs={})
    said: list[str] = []
    model: Any = build_model(params, tmp_path / "model", HEAD, 0, 9, said.append).eval()
    alone, padded = torch.tensor([[4, 2, 5]]), torch.tensor([[4, 2, 5, 9, 9]])
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=padded, attention_mask=(padded != 9).long()).logits, model(input_ids=alone).logits
        )
    assert said == ["model.source: its config pads with token 2, its tokenizer with 9, which counts"]
    save_model(model, tmp_path / "saved", params)
    assert json.loads((tmp_path / "saved/config.json").read_text())["pad_token_id"] == 9
