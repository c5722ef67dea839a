"""What public reports and an attack found of models and their folders.

An input a row, and the line or the value that is right.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from stages.batches.tokenized import Task
from stages.config.pretrained import resolve_model
from stages.config.read import read_yaml
from stages.config.schema import ModelParams, TrainParams
from stages.data.encode import load_config, load_tokenizer
from stages.keeping.identity import LOADED, _loaded
from stages.modeling import codec
from stages.modeling.buffers import remember_buffers
from stages.modeling.build import build_model, load_model, save_model
from stages.modeling.forward import Forward
from stages.modeling.head import head_of
from stages.modeling.losses import make_objective
from stages.watching import preflight
from tests.support.project import ROOT, line_of
from tests.support.runs import make_state, take_steps

CPU = torch.device("cpu")
Damage = Callable[[Path], object]


# Who may run code: a folder that is loaded.

OWN = """
from os import system
from subprocess import run
from torch import nn
from torch.nn import Linear, Identity
def build(columns, outputs): return Linear(columns, outputs)
def shell(command): return system(command)
class Plain: pass
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with a module of its own, own_code, as a dep; other_code, which is none; and a data folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("own_code", "other_code", "raw", "raw.code", "loose", "loose.code"):
        monkeypatch.delitem(sys.modules, name, raising=False)  # that of another test
    for name in ("own_code.py", "other_code.py", "raw/__init__.py", "raw/code.py", "loose/code.py"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(OWN, encoding="utf-8")
    deps = ["own_code.py", "${data.path}", "stages/ground", "loose/data.csv"]
    Path("dvc.yaml").write_text(json.dumps({"stages": {"train": {"cmd": "x", "deps": deps}}}))
    return tmp_path


def factory_folder(source: object, kwargs: object, **more: object) -> Path:
    folder = Path("model")
    folder.mkdir()
    save_file(nn.Linear(3, 2).state_dict(), folder / "model.safetensors")
    (folder / "model.json").write_text(json.dumps({"source": source, "kwargs": kwargs, **more}))
    return folder


COMMAND = {"command": "touch done"}
SIZES = {"columns": 3, "outputs": 2}


@pytest.mark.parametrize(
    ("source", "kwargs", "expected"),
    [
        (
            "factory:os:system",
            COMMAND,
            "only what stages/custom, or code that dvc.yaml lists as a dep, defines is called",
        ),
        ("factory:subprocess:run", {"args": "touch done", "shell": True}, "only what stages/custom"),
        ("factory:builtins:exec", {}, "only what stages/custom"),
        ("factory:torch.nn:Linear", {"in_features": 3, "out_features": 2}, "only what stages/custom"),
        ("factory:torch.hub:load", {"repo_or_dir": "a/b", "model": "c"}, "only what stages/custom"),
        ("factory:stages.ground.disk:remove", {"path": "own_code.py"}, "only what stages/custom"),
        ("factory:stages.customs:build", SIZES, "only what stages/custom"),
        ("factory:other_code:build", SIZES, "only what stages/custom"),
        ("factory:raw.code:build", SIZES, "only what stages/custom"),
        ("factory:loose.code:build", SIZES, "only what stages/custom"),
        ("factory:no_such_module:build", SIZES, "only what stages/custom"),
        ("factory::build", SIZES, "only what stages/custom"),
        ("factory:own_code:system", COMMAND, "neither a nn.Module nor a function that is defined there"),
        ("factory:own_code:run", {"args": "touch done", "shell": True}, "neither a nn.Module nor a function"),
        ("factory:own_code:Plain", {}, "neither a nn.Module nor a function"),
        ("factory:own_code:__builtins__", {}, "neither a nn.Module nor a function"),
        ("factory:own_code:nothing", {}, "cannot be imported"),
        ("os:system", COMMAND, "it should be factory:module:callable"),
        ("bert-base-cased", {}, "it should be factory:module:callable"),
        (["factory:own_code:build"], SIZES, "it should hold source and kwargs"),
        ("factory:own_code:build", [1], "it should hold source and kwargs"),
        ("factory:own_code:build", {"columns": 4, "outputs": 2}, "size mismatch"),
        ("factory:own_code:Identity", {}, "its weights are those of another model"),
    ],
)
def test_folder_calls_only_the_projects_own_code(here: Path, source: object, kwargs: object, expected: str) -> None:
    folder = factory_folder(source, kwargs)
    assert expected in line_of(lambda: load_model(folder, CPU))
    assert not Path("done").exists() and Path("own_code.py").exists()


def test_own_code_is_called_and_other_code_where_the_caller_names_it(here: Path) -> None:
    folder = factory_folder("factory:own_code:build", SIZES)
    assert isinstance(load_model(folder, CPU), nn.Linear)
    assert isinstance(load_model(folder, CPU, "factory:own_code:build", SIZES), nn.Linear)
    (folder / "model.json").write_text(json.dumps({"source": "factory:other_code:build", "kwargs": SIZES}))
    assert isinstance(load_model(folder, CPU, "factory:other_code:build"), nn.Linear)
    line = line_of(lambda: load_model(folder, CPU, "factory:own_code:build"))
    assert "names 'factory:other_code:build', but model.source is 'factory:own_code:build'" in line
    assert "but model.kwargs is {}" in line_of(lambda: load_model(folder, CPU, "factory:other_code:build", {}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", "it should hold source and kwargs"),
        ('{"source": "factory:own_code:build"', "it should hold source and kwargs"),
        ("[" * 100_000, "it should hold source and kwargs"),
        ('{"source": "factory:own_code:build", "kwargs": {}, "run": "x"}', "it should hold source and kwargs"),
    ],
)
def test_model_json_that_is_none_is_one_line(here: Path, text: str, expected: str) -> None:
    folder = factory_folder("factory:own_code:build", SIZES)
    (folder / "model.json").write_text(text)
    assert expected in line_of(lambda: load_model(folder, CPU))


@pytest.mark.parametrize(
    "name",
    [
        "pytorch_model.bin",
        "modeling.py",
        "tokenizer_evil.py",
        "adapter_config.json",
        "x.pkl",
        "custom_generate",
        "config.json",
    ],
)
def test_folder_of_a_model_holds_nothing_else(here: Path, name: str) -> None:
    folder = factory_folder("factory:own_code:build", SIZES)
    (folder / name).write_text("{}")
    line = line_of(lambda: load_model(folder, CPU))
    assert name in line and "run: dvc repro train" in line


def test_model_json_in_the_folder_of_a_pretrained_model_is_not_followed(
    here: Path, tiny_model: Path, tmp_path: Path
) -> None:
    params = ModelParams(source=str(tiny_model), revision=None, kwargs={})
    model = build_model(params, tiny_model, HEAD, 0)
    folder = tmp_path / "candidate"
    save_model(model, folder, params)
    load_model(folder, CPU)
    (folder / "model.json").write_text(json.dumps({"source": "factory:os:system", "kwargs": COMMAND}))
    assert "model.json and config.json" in line_of(lambda: load_model(folder, CPU))
    (folder / "config.json").unlink()
    assert "only what stages/custom" in line_of(lambda: load_model(folder, CPU))
    assert "but model.source is" in line_of(lambda: load_model(folder, CPU, str(tiny_model), {}))
    assert not Path("done").exists()


# Broken model folders.

HEAD = head_of(Task("classification", ("no", "yes"), ("text",), (), "label", ("input_ids",)), "")


def config(**changes: object) -> Damage:
    def write(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return write


def text(name: str, content: str) -> Damage:
    return lambda folder: (folder / name).write_text(content)


def weights(change: Callable[[bytes], bytes]) -> Damage:
    return lambda folder: (folder / "model.safetensors").write_bytes(
        change((folder / "model.safetensors").read_bytes())
    )


def header(values: object, data: bytes = b"") -> bytes:
    content = json.dumps(values).encode()
    return len(content).to_bytes(8, "little") + content + data


def sharded(*names: str) -> Damage:
    def write(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "all.safetensors")
        index = {"metadata": {}, "weight_map": {f"tensor {number}": name for number, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return write


def pipe(folder: Path) -> None:
    sharded("pipe.safetensors")(folder)
    os.mkfifo(folder / "pipe.safetensors")


def without(part: str) -> Damage:
    """A folder whose weights lack those with `part` in their name."""

    def write(folder: Path) -> None:
        kept = {name: value for name, value in load_file(folder / "model.safetensors").items() if part not in name}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return write


def damaged(tiny_model: Path, tmp_path: Path, damage: Damage) -> Path:
    folder = shutil.copytree(tiny_model, tmp_path / "outer/model")
    save_file({"tensor": torch.ones(1)}, folder.parent / "outside.safetensors")
    damage(folder)
    return folder


def load(folder: Path) -> nn.Module:
    """As tokenize and train do, one after the other."""
    resolved = resolve_model(str(folder), None)
    assert resolved is not None
    tokenizer = load_tokenizer(folder, "model.source")
    load_config(folder, str(folder))
    params = ModelParams(source=str(folder), revision=None, kwargs={})
    return build_model(params, folder, HEAD, 0, tokenizer.pad_token_id)


F32 = {"dtype": "F32", "shape": [1]}


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (text("config.json", "[1]"), "config.json should hold an object, found a list; fetch it again"),
        (text("config.json", '"x"'), "config.json should hold an object, found a str"),
        (text("config.json", '{"model_type": "bert"'), "config.json cannot be read: Expecting ','"),
        (text("config.json", ""), "config.json cannot be read: Expecting value"),
        (text("config.json", '{"a": ' * 100_000), "config.json cannot be read: maximum recursion depth exceeded"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe{"), "config.json cannot be read: 'utf-8' "),
        (text("tokenizer.json", "[1]"), "tokenizer.json should hold an object, found a list"),
        (text("tokenizer.json", "{}"), "its tokenizer cannot be loaded"),
        (text("tokenizer.json", '{"version": "1.0", "model": {"type": "Nothing"}}'), "its tokenizer cannot be loaded"),
        (text("tokenizer_config.json", "[1]"), "tokenizer_config.json should hold an object, found a list"),
        (text("tokenizer_config.json", '{"tokenizer_class": 1}'), "its tokenizer cannot be loaded"),
        (text("special_tokens_map.json", "[1]"), "special_tokens_map.json should hold an object, found a list"),
        (text("generation_config.json", "null"), "generation_config.json should hold an object, found a NoneType"),
        (config(hidden_size="x"), "hidden_size"),
        (config(id2label=[1]), "its config.json cannot be used"),
        (config(num_attention_heads=0), "cannot be loaded"),
        (config(hidden_size=-1), "cannot be loaded"),
        (config(model_type=[1]), "cannot be used"),
        (config(vocab_size=7), "has the shape"),
        (config(pad_token_id=10**6), ""),
        (config(transformers_weights="other.safetensors"), "names its weights by transformers_weights"),
        (config(quantization_config={"quant_method": "x"}), "has a quantization_config"),
        (text("adapter_config.json", '{"base_model_name_or_path": "a/b"}'), "merge the adapter into one"),
        (weights(lambda data: data[: len(data) // 2]), "model.safetensors cannot be read: Error while deserializing"),
        (weights(lambda data: data[:4]), "model.safetensors cannot be read: Error while deserializing"),
        (weights(lambda data: b""), "model.safetensors cannot be read"),
        (weights(lambda data: b"\xff" * 8 + data[8:]), "model.safetensors cannot be read: Error while deserializing"),
        (weights(lambda data: (2**40).to_bytes(8, "little") + data[8:]), "header too large"),
        (weights(lambda data: (200).to_bytes(8, "little") + b"{" * 200), "invalid JSON in header"),
        (
            weights(lambda data: header({name: F32 | {"data_offsets": [0, 4]} for name in "ab"}, bytes(8))),
            "model.safetensors cannot be read: Error while deserializing",
        ),
        (
            weights(lambda data: header({"a": F32 | {"data_offsets": [4, 8]}}, bytes(8))),
            "model.safetensors cannot be read: Error while deserializing",
        ),
        (weights(lambda data: header({"a": F32 | {"data_offsets": [0, 4]}}, bytes(4))), "none of its weights"),
        (sharded("pytorch_model.bin"), "names 'pytorch_model.bin'; only safetensors inside of the folder are loaded"),
        (sharded("all.safetensors", "x.bin"), "names 'x.bin'; only safetensors inside"),
        (sharded("../outside.safetensors"), "names '../outside.safetensors'; only safetensors inside"),
        (sharded("parts/../../outside.safetensors"), "only safetensors inside"),
        (sharded("/etc/outside.safetensors"), "names '/etc/outside.safetensors'; only safetensors inside"),
        (sharded("missing.safetensors"), "missing.safetensors cannot be read"),
        (sharded(), "should have a weight_map"),
        (sharded(7), "should have a weight_map"),  # type: ignore[arg-type]
        (sharded("."), "names '.'; only safetensors"),
        (pipe, "no such file"),
        (config(attn_implementation="org/kernel"), "names 'org/kernel' as its attn_implementation, which is code on"),
        (config(_attn_implementation_internal={"": "paged|org/kernel@main:run"}), "which is code on the Hub"),
        (config(text_config={"_experts_implementation": "org/kernel"}), "which is code on the Hub"),
    ],
)  # fmt: skip
def test_broken_model_folder_is_one_line(damage: Damage, expected: str, tiny_model: Path, tmp_path: Path) -> None:
    folder = damaged(tiny_model, tmp_path, damage)
    if expected:
        assert expected in line_of(lambda: load(folder))
    else:
        load(folder)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (config(num_hidden_layers=3), "16 of 55 weights of its encoder are not in its folder, and new: bert.encoder.l"),
        (without("layer.1."), "16 of 39 weights of its encoder are not in its folder, and new: bert.encoder.layer.1."),
        (without("word_embeddings"), "1 of 39 weights of its encoder are not in its folder, and new: bert.embeddings"),
    ],
)
def test_encoder_weights_that_begin_at_random_are_told(
    damage: Damage, lost: str, tiny_model: Path, tmp_path: Path
) -> None:
    folder, said = damaged(tiny_model, tmp_path, damage), list[str]()
    build_model(ModelParams(source="model", revision=None, kwargs={}), folder, HEAD, 0, 0, said.append)
    (line,) = said
    assert line.startswith("warning: model.source: ") and lost in line


@pytest.mark.parametrize("name", ["BertConfig", "BertTokenizer", "AutoTokenizer", "pipeline"])
def test_folder_that_names_something_else_than_a_model_is_one_line(name: str, tiny_model: Path, tmp_path: Path) -> None:
    params = ModelParams(source=str(tiny_model), revision=None, kwargs={})
    save_model(build_model(params, tiny_model, HEAD, 0), tmp_path / "candidate", params)
    config(architectures=[name])(tmp_path / "candidate")
    assert f"names {name!r}, which is no model" in line_of(lambda: load_model(tmp_path / "candidate", CPU))


@pytest.mark.parametrize("key", ["to_dict", "save_pretrained"])
def test_keyword_that_is_no_setting_is_refused(key: str, tiny_model: Path) -> None:
    params = ModelParams(source="tiny", revision=None, kwargs={key: 7})
    assert f"{key!r} is no setting of BertConfig" in line_of(lambda: build_model(params, tiny_model, HEAD, 0))


def test_index_that_names_a_pickle_is_refused_where_the_identity_is_found(tiny_model: Path, tmp_path: Path) -> None:
    folder = damaged(tiny_model, tmp_path, sharded("pytorch_model.bin"))
    assert "only safetensors" in line_of(lambda: resolve_model(str(folder), None))
    assert "only safetensors" in line_of(lambda: _loaded(folder, LOADED["train"]))


def test_shards_in_a_folder_below_are_loaded_and_part_of_the_identity(tiny_model: Path, tmp_path: Path) -> None:
    folder = damaged(tiny_model, tmp_path, lambda folder: None)
    expected = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    (folder / "parts").mkdir()
    (folder / "model.safetensors").rename(folder / "parts/one.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(expected, "parts/one.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert folder / "parts/one.safetensors" in _loaded(folder, LOADED["train"])
    found = load(folder).state_dict()
    assert all(torch.equal(found[f"bert.{name}"], tensor) for name, tensor in expected.items())


# What a loaded model brings is compared with tokenizer and data.

NAMES = ("negative", "neutral", "positive")


def trained(
    tiny_model: Path, folder: Path, kind: Any = AutoModelForSequenceClassification, **changes: Any
) -> nn.Module:
    """A folder with a model that has a head of its own; the model."""
    torch.manual_seed(5)
    settings = AutoConfig.from_pretrained(tiny_model)
    settings.update({"problem_type": None, "id2label": dict(enumerate(NAMES))} | changes)
    model = kind.from_config(settings)
    for parameter in model.classifier.parameters():
        nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return model.eval()


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


# Any nn.Module.


class Odd(nn.Module):
    """With one of the things that modules may have; `outputs` logits of `columns` numbers."""

    expanded: torch.Tensor
    conjugate: torch.Tensor

    def __init__(self, what: str, columns: int = 3, outputs: int = 2) -> None:
        super().__init__()
        self.what, self.extra = what, {"plain": {"a": [1, (2.5, None)]}, "tensor": {"t": torch.ones(2)}}.get(what)
        self.layer = nn.LazyLinear(outputs) if what == "lazy" else nn.Linear(columns, outputs)
        if what == "expanded":
            self.register_buffer("expanded", torch.zeros(1).expand(columns))
            self.scale = nn.Parameter(torch.ones(1).expand(columns))
        if what.startswith("complex"):
            self.phase = nn.Parameter(torch.ones(columns, dtype=getattr(torch, what)))
            self.register_buffer("conjugate", (1j * torch.ones(columns, dtype=getattr(torch, what))).conj())
        if what == "set":
            self.extra = {"words": {1, 2}}

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if self.what == "expanded":
            self.expanded += 1
            features = features * self.scale + self.expanded
        if self.what.startswith("complex"):
            features = (features * self.phase * self.conjugate).abs().float()
        return self.layer(features)

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("what", ["expanded", "complex64", "complex128", "plain", "tensor"])
def test_module_is_the_same_after_training_saving_and_a_checkpoint(what: str, tmp_path: Path) -> None:
    source = f"{Odd.__module__}:Odd"
    params = ModelParams(source=f"factory:{source}", revision=None, kwargs={"what": what})
    model: Any = build_model(params, None, HEAD, 0)
    put_back = remember_buffers(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    put_back()
    optimizer.step()
    model(torch.ones(2, 3))
    if what == "plain":
        model.extra["a"].append((3, "b"))
    if what == "tensor":
        model.extra["t"] += 1
    save_model(model, tmp_path, params)
    loaded: Any = load_model(tmp_path, CPU, params.source, params.kwargs)
    skeleton, tensors = codec.split(model.state_dict(), "model")
    save_file(tensors, tmp_path / "checkpoint")
    resumed: Any = build_model(params, None, HEAD, 1)
    resumed.load_state_dict(codec.join(json.loads(json.dumps(skeleton)), load_file(tmp_path / "checkpoint")))
    with torch.no_grad():
        expected = model(torch.ones(2, 3))
    for other in (loaded, resumed):
        assert torch.equal(other(torch.ones(2, 3)), expected)
        assert str(other.extra) == str(model.extra)


def test_look_at_a_model_leaves_its_extra_state_as_it_was() -> None:
    model: Any = Odd("tensor")
    put_back = remember_buffers(model)
    model.extra["t"] += 1
    put_back()
    assert model.extra["t"].tolist() == [1, 1]


class Named(nn.Module):
    """Has a layer by the name that extra states are kept under."""

    def __init__(self) -> None:
        super().__init__()
        self.extra_state = nn.Linear(3, 2)


def test_layer_called_extra_state_is_a_layer(tmp_path: Path) -> None:
    params = ModelParams(source=f"factory:{Named.__module__}:Named", revision=None, kwargs={})
    model = build_model(params, None, HEAD, 0)
    save_model(model, tmp_path, params)
    loaded = load_model(tmp_path, CPU, params.source, {})
    assert torch.equal(loaded.state_dict()["extra_state.weight"], model.state_dict()["extra_state.weight"])


def test_complex_parameters_are_trained() -> None:
    from stages.training.optim import make_optimizer

    model = Odd("complex64")
    optimizer = make_optimizer(model, TrainParams.model_validate(read_yaml(ROOT / "params.yaml")["train"]), CPU)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    assert not torch.equal(model.phase, torch.ones(3, dtype=torch.complex64))


def test_extra_state_that_is_no_plain_data_is_refused(tmp_path: Path) -> None:
    params = ModelParams(source=f"factory:{Odd.__module__}:Odd", revision=None, kwargs={"what": "set"})
    model = build_model(params, None, HEAD, 0)
    line = line_of(lambda: save_model(model, tmp_path, params))
    assert (
        "_extra_state.words: a state holds dicts, lists" in line and "found set, so no checkpoint can hold it" in line
    )


def test_lazy_layer_is_named(tmp_path: Path) -> None:
    params = ModelParams(source=f"factory:{Odd.__module__}:Odd", revision=None, kwargs={"what": "lazy"})
    assert "layer.weight has no shape before the model was called" in line_of(
        lambda: build_model(params, None, HEAD, 0)
    )


@pytest.mark.parametrize("source", ["builtins:print", "collections:OrderedDict", "math:pi", "os:system"])
def test_what_makes_no_module_is_not_called(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    params = ModelParams(source=f"factory:{source}", revision=None, kwargs={})
    assert "is no function or class that gives a nn.Module" in line_of(lambda: build_model(params, None, HEAD, 0))


class Plain(nn.Module):
    """With one of the ways in which people write modules."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.layer = what, nn.Linear(3, 2)
        self.seen: torch.Tensor | None = None
        self.own = torch.Generator().manual_seed(0)
        if what == "sparse":
            self.register_buffer("table", torch.eye(3).to_sparse())
        if what == "meta":
            self.register_buffer("table", torch.ones(3, device="meta"))

    def forward(self, features: torch.Tensor, /) -> torch.Tensor:
        if self.what == "remembers":
            self.seen = features
        if self.what == "draws":
            features = features + torch.randn(features.shape, generator=self.own)
        return self.layer(features)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        return None if self.what == "returns nothing" else self

    def to(self, *args: Any, **kwargs: Any) -> Any:
        super().to(*args, **kwargs)
        return None if self.what == "returns nothing" else self

    def get_extra_state(self) -> Any:
        if self.what == "raises":
            raise LookupError("no words")

    def set_extra_state(self, state: Any) -> None: ...


def plain(what: str) -> ModelParams:
    return ModelParams(source=f"factory:{Plain.__module__}:Plain", revision=None, kwargs={"what": what})


def test_module_whose_train_and_to_return_nothing_is_loaded(tmp_path: Path) -> None:
    params = plain("returns nothing")
    save_model(build_model(params, None, HEAD, 0), tmp_path, params)
    assert not load_model(tmp_path, CPU, params.source, params.kwargs).training


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("raises", "its state cannot be kept, as where a buffer is sparse or nested: LookupError: no words"),
        ("sparse", "its state cannot be kept, as where a buffer is sparse or nested: RuntimeError"),
        ("meta", "table is on the meta device, so it has no values"),
    ],
)
def test_buffer_that_cannot_be_kept_is_one_line(what: str, expected: str) -> None:
    assert expected in line_of(lambda: build_model(plain(what), None, HEAD, 0))


def traced() -> nn.Module:
    return torch.jit.trace(nn.Linear(3, 2), torch.zeros(1, 3))


@pytest.mark.parametrize("make", [lambda: Plain(""), traced])
def test_module_that_names_no_column_is_given_the_first_by_position(make: Callable[[], nn.Module]) -> None:
    assert Forward(make())({"features": torch.ones(4, 3)}).shape == (4, 2)


@pytest.mark.parametrize(("what", "changed"), [("", []), ("remembers", ["seen"]), ("draws", ["own"])])
def test_what_a_model_keeps_in_no_checkpoint_is_named(what: str, changed: list[str]) -> None:
    class Own(Plain):
        get_extra_state = nn.Module.get_extra_state

    model = Own(what)
    own = preflight._watch_own_state(model)
    model(torch.ones(2, 3))
    assert own() == changed


def test_tensor_that_changes_its_shape_ends_the_run_before_a_checkpoint_holds_it() -> None:
    state = make_state()
    take_steps(state, 1)
    state.require_layout()
    state.model.register_buffer("late", torch.ones(1))
    line = line_of(state.require_layout)
    assert (
        "forward changed late, which was not there when the model was built and is torch.float32 (1,) at step 1" in line
    )


def test_sparse_gradient_is_refused_before_training() -> None:
    model = nn.Embedding(3, 2, sparse=True)
    model(torch.tensor([1])).sum().backward()
    assert "weight gets a sparse gradient" in line_of(lambda: preflight._doubt_gradients(model, print))


class Counts(nn.Module):
    """A loss that holds something, and changes it if `how` says so."""

    average: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.calls, self.seen = how, 0, [1]
        self.register_buffer("average", torch.zeros(()))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.how == "buffer in place":
            self.average.mul_(0.9).add_(logits.detach().mean())
        if self.how == "buffer anew":
            self.average = self.average * 0.9
        if self.how == "number":
            self.calls += 1
        if self.how == "list":
            self.seen.append(1)
        if self.how == "new attribute":
            self.first = float(logits.sum())
        return nn.functional.cross_entropy(logits, labels) + self.average


class CallsCounted:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return nn.functional.cross_entropy(logits, labels) / self.calls


@pytest.mark.parametrize(
    ("name", "kwargs", "changes"),
    [
        ("Counts", {"how": "nothing"}, None),
        ("Counts", {"how": "buffer in place"}, "average"),
        ("Counts", {"how": "buffer anew"}, "average"),
        ("Counts", {"how": "number"}, "calls"),
        ("Counts", {"how": "list"}, "seen"),
        ("Counts", {"how": "new attribute"}, "first"),
        ("CallsCounted", {}, "calls"),
    ],
)
def test_loss_with_a_state_that_no_checkpoint_holds_is_refused(
    name: str, kwargs: dict[str, Any], changes: str | None
) -> None:
    values = read_yaml(ROOT / "params.yaml")["train"] | {"loss": f"{__name__}:{name}", "loss_kwargs": kwargs}
    split = datasets.Dataset.from_dict({"labels": [0, 1]})
    task = Task("classification", ("a", "b"), ("text",), (), "label", ("input_ids",))
    objective = make_objective(TrainParams.model_validate(values), task, split, CPU)
    batch = torch.zeros(2, 2), torch.tensor([0, 1])
    if changes is None:
        assert torch.equal(objective.rows(*batch), objective.rows(*batch))
    else:
        assert f"changes its own {changes} when it is called" in line_of(lambda: objective.rows(*batch))
