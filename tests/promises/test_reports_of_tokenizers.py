"""What people reported about tokenizers: the input, and the line or value that answers it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stages import tokenize as stage
from stages.batches import tokenized as store
from stages.ground.running import run_command
from tests.support.project import WORDS, Project
from tests.support.reports import DEV, TRAIN, edit, lay_out, refusal, says, text

# ---------------------------------------------------------------------------------------------- tokenizers


def roberta(model: Path, **config: Any) -> None:
    # [PAD] of the tiny tokenizer is id 0, so that one position is never used.
    edit(model / "config.json", **{"model_type": "roberta", "max_position_embeddings": 34, "pad_token_id": 0, **config})
    edit(model / "tokenizer_config.json", model_max_length=64)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "esm", "bert"])
def test_positions_below_the_padding_are_not_advised(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], family: str
) -> None:
    roberta(model, model_type=family)
    lay_out(project, {"train.csv": text(TRAIN)})
    usable = 34 if family == "bert" else 33
    project.write_params(tokenize={"max_length": 40})
    assert f"write at most {usable}\n" in refusal(capsys)
    project.write_params(tokenize={"max_length": usable})
    run_command(stage.main)


def test_roberta_has_two_positions_fewer_where_the_pad_token_is_1(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roberta(model, pad_token_id=1)
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params(tokenize={"max_length": 34, "pad_token": "[UNK]"})
    assert "max_position_embeddings is 34, of which 32 are for tokens; write at most 32\n" in refusal(capsys)


def test_tokenizer_that_pads_otherwise_than_a_model_that_counts_from_padding_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    roberta(model, pad_token_id=1)
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    assert "pads with '[PAD]', id 0, but the model's pad_token_id is 1" in (line := refusal(capsys))
    assert "write '[UNK]' in tokenize.pad_token" in line


def test_end_of_sequence_pads_where_nothing_else_does_and_a_line_says_so(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lay_out(project, {"train.csv": text(TRAIN)})
    edit(model / "tokenizer_config.json", pad_token=None, eos_token="[SEP]")
    project.write_params()
    assert "no pad token; '[SEP]' is taken (tokenize.pad_token names another)" in says(capsys)
    loaded = store.load_tokenizer()
    assert loaded is not None and loaded.pad_token == "[SEP]"
    project.write_params(tokenize={"pad_token": "[MASK]"})
    assert "is taken" not in says(capsys)
    loaded = store.load_tokenizer()
    assert loaded is not None and loaded.pad_token == "[MASK]"


@pytest.mark.parametrize(
    ("wanted", "part"),
    [
        ("<nothing>", "tokenize.pad_token is '<nothing>', which is no token"),
        (None, "write '[PAD]' in tokenize.pad_token"),
    ],
)
def test_pad_token_that_is_none_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], wanted: str | None, part: str
) -> None:
    edit(model / "tokenizer_config.json", pad_token=None)
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params(tokenize={"pad_token": wanted})
    assert part in refusal(capsys)


SPECIAL = TRAIN + "the cat [SEP] a dog,a\n"


@pytest.mark.parametrize("token", ["[SEP]", "[MASK]", "[PAD]", "[CLS]"])
def test_special_token_in_a_text_is_refused_with_its_row(
    project: Project, capsys: pytest.CaptureFixture[str], token: str
) -> None:
    # Rows of what is cut off keep the numbers that they have in the file.
    project.write_params(data={"validation_size": 0.5})
    lay_out(project, {"train.csv": text(SPECIAL.replace("[SEP]", token))})
    line = refusal(capsys)
    assert f"data/in/train.csv: row 21, column 'text' holds '{token}'" in line
    assert "tokenize.split_special_tokens: true" in line


@pytest.mark.parametrize(("split", "count"), [(True, 1), (False, 2)])
def test_special_token_in_a_text_is_read_as_one_says(project: Project, split: bool, count: int) -> None:
    project.write_params(tokenize={"split_special_tokens": split})
    lay_out(project, {"train.csv": text(SPECIAL), "dev.csv": text(SPECIAL)})
    run_command(stage.main)
    tokenizer = store.load_tokenizer()
    assert tokenizer is not None
    ids = store.load_split(store.TOKENIZED, "train")[20]["input_ids"]
    assert ids.count(tokenizer.sep_token_id) == count
    assert ids == tokenizer("the cat [SEP] a dog")["input_ids"], "whoever loads the tokenizer reads it alike"


def test_what_only_looks_like_a_special_token_is_text(project: Project) -> None:
    project.write_params()
    lay_out(project, {"train.csv": text(TRAIN + "the [sep] cat,a\n[ SEP ] [X],b\n")})
    run_command(stage.main)


def test_end_of_sequence_in_a_text_of_an_encoder_decoder_is_never_read_as_that(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(model / "config.json", model_type="bart", is_encoder_decoder=True)
    edit(model / "tokenizer_config.json", eos_token="[SEP]")
    lay_out(project, {"train.csv": text(SPECIAL)})
    project.write_params(tokenize={"split_special_tokens": False})
    assert "row 21, column 'text' holds '[SEP]'" in refusal(capsys)


def test_special_token_that_is_a_piece_of_text_too_is_refused_though_it_should_be_split(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import T5Config, T5Tokenizer

    letters = sorted({*"".join(WORDS), "<", "/", ">"})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in letters)]
    for path in model.glob("tokenizer*"):
        path.unlink()
    T5Tokenizer(vocab=pieces, extra_ids=3).save_pretrained(str(model))
    T5Config(vocab_size=64).save_pretrained(str(model))
    lay_out(project, {"train.csv": text(TRAIN + "a <unk> 😀,b\nthe </s> cat,a\n")})
    project.write_params(tokenize={"split_special_tokens": True})
    assert "row 22, column 'text' holds '</s>'" in (line := refusal(capsys)) and "change the text" in line


def test_models_own_tokenizer_with_tokens_that_the_model_lacks_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(str(model))
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    line = refusal(capsys)
    assert f"its tokenizer has {size + 1} tokens, but model.source has {size}; give the model an embedding" in line


@pytest.mark.parametrize("cell", ["\u200b", "\x01\x02"])
@pytest.mark.parametrize("columns", [["text"], ["other", "text"]])
def test_row_of_nothing_but_special_tokens_is_refused(
    project: Project, capsys: pytest.CaptureFixture[str], cell: str, columns: list[str]
) -> None:
    rows = "text,other,label\nthe cat,a,x\na dog,a,y\n"
    lay_out(project, {"train.csv": text(f"{rows}{cell},a,x\n"), "dev.csv": text(rows)})
    project.write_params(data={"text_columns": columns})
    assert "train.csv: row 3, column 'text' becomes no token at all" in refusal(capsys)


def vocabulary(change: Callable[[dict[str, int]], object]) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        content = json.loads((model / "tokenizer.json").read_text())
        change(content["model"]["vocab"])
        (model / "tokenizer.json").write_text(json.dumps(content))

    return write


def names_inputs(*names: str) -> Callable[[Path], None]:
    return lambda model: edit(model / "tokenizer_config.json", model_input_names=list(names))


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (vocabulary(lambda vocab: vocab.pop("[UNK]")), "train.csv: row 21: the tokenizer fails at this row: WordPiece"),
        (vocabulary(lambda vocab: vocab.update(cat=5000)), "its tokenizer gives 'cat' the id 5000, but model.source"),
        (names_inputs(), "its tokenizer makes nothing (model_input_names in tokenizer_config.json)"),
        (names_inputs("pixel_values"), "a model of text reads 'input_ids'; name that there, too"),
    ],
)
def test_tokenizer_that_the_model_or_a_row_does_not_fit_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], None], part: str
) -> None:
    change(model)
    lay_out(project, {"train.csv": text(TRAIN + "a 😀 cat,a\n"), "dev.csv": text(DEV)})
    project.write_params()
    assert part in refusal(capsys)


XLNET = {"model_type": "xlnet", "vocab_size": 200}


@pytest.mark.parametrize(("config", "side"), [(None, "right"), (XLNET, "left")])
def test_padding_that_moves_positions_is_put_on_the_other_side(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], config: dict[str, Any] | None, side: str
) -> None:
    edit(model / "tokenizer_config.json", padding_side="left")
    if config:
        (model / "config.json").write_text(json.dumps(config))
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    assert ("pads on the left, which moves the positions" in says(capsys)) == (side == "right")
    loaded = store.load_tokenizer()
    assert loaded is not None and loaded.padding_side == side


def test_architecture_with_two_base_models_is_looked_at_too(project: Project, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "funnel", "vocab_size": 200}))
    lay_out(project, {"train.csv": text(TRAIN)})
    project.write_params()
    run_command(stage.main)


@pytest.mark.parametrize("columns", [["text"], ["text", "other"]])
def test_row_of_no_token_is_refused(
    project: Project, model: Path, capsys: pytest.CaptureFixture[str], columns: list[str]
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(vocab={word: n for n, word in enumerate(sorted({*"".join(WORDS), "_"}))}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="_").save_pretrained(str(model))
    lay_out(project, {"train.csv": text("text,other,label\nthe cat,a,x\n😀,😀,y\na dog,a,x\nthe,a,y\n")})
    lay_out(project, {"dev.csv": text("text,other,label\nthe cat,a,x\n")})
    project.write_params(data={"text_columns": columns})
    assert "train.csv: row 2, column 'text'" in (line := refusal(capsys)) and "no token at all" in line
