"""What public reports and an attack found of folders of models.

An input a row, and the line or the value that is right.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.config.pretrained import resolve_model
from stages.config.schema import ModelParams
from stages.data.encode import load_config, load_tokenizer
from stages.keeping.identity import LOADED, _loaded
from stages.modeling.build import build_model, load_model, save_model
from tests.support.project import line_of
from tests.support.reports import HEAD, without
from tests.support.runs import CPU

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
