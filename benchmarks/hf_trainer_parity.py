"""The loss curve of Holdfast's own loop beside that of HF Trainer: the same rows, weights, optimizer and schedule.

python -m pip install accelerate
python benchmarks/hf_trainer_parity.py --steps 50

Holdfast runs as its real stages (tokenize, build_loaders, train) in a temporary folder; Trainer runs in this process
on the tokenized rows in the order of the batch plan. fp32, no dropout, fused AdamW with weight decay, linear schedule
with warm-up, gradients clipped to 1.0; in one micro-batch a step, and in two. Prints the largest difference of the
losses of a step; the exit code is 1 above --tolerance.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("tokenize", "build_loaders", "train")
BATCH_SIZE = 16
WARMUP_STEPS = 5
LABELS = {"classification": "label", "regression": "overlap"}


def overlap(first: str, second: str) -> float:
    """The share of the pair's words that both sentences have: a number to predict."""
    a, b = (set(re.findall(r"\w+", text.lower())) for text in (first, second))
    return len(a & b) / len(a | b)


def prepare(workspace: Path, task: str, accumulation: int, steps: int) -> None:
    """Stages, data and parameters in `workspace`."""
    from ruamel.yaml import YAML

    shutil.copytree(ROOT / "stages", workspace / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "dvc.yaml", workspace)
    (workspace / "data/pairs").mkdir(parents=True)
    (workspace / "metrics").mkdir()
    for split in ("train", "validation"):
        source, target = ROOT / f"data/sample/{split}.csv", workspace / f"data/pairs/{split}.csv"
        with source.open(newline="", encoding="utf-8") as rows, target.open("w", newline="", encoding="utf-8") as out:
            writer = csv.writer(out)
            writer.writerow(["sentence1", "sentence2", "label", "overlap"])
            for row in csv.DictReader(rows):
                writer.writerow([*row.values(), overlap(row["sentence1"], row["sentence2"])])
    yaml = YAML()
    params = yaml.load((ROOT / "params.yaml").read_bytes())
    params["data"] |= {"path": "data/pairs", "task": task, "label_column": LABELS[task]}
    params["model"]["kwargs"] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    params["build_loaders"] |= {"batch_size": BATCH_SIZE, "micro_batch_size": BATCH_SIZE // accumulation}
    params["train"] |= {"max_steps": steps, "warmup_steps": WARMUP_STEPS, "logging_steps": 1, "device": "cpu"}
    metric = {"classification": "accuracy", "regression": "mse"}[task]
    params["evaluate"] |= {"metrics": [metric], "metric_for_best_model": metric}
    with (workspace / "params.yaml").open("wb") as file:
        yaml.dump(params, file)


def holdfast(workspace: Path) -> list[float]:
    """Run the stages; the loss of every step."""
    for stage in STAGES:
        run = subprocess.run(
            [sys.executable, "-m", f"stages.{stage}"], cwd=workspace, capture_output=True, text=True, check=False
        )
        if run.returncode:
            raise SystemExit(f"stage {stage} ended with {run.returncode}:\n{run.stderr}")
    with (workspace / "plots/train.tsv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file, delimiter="\t")]


def trainer(workspace: Path, accumulation: int, steps: int) -> list[float]:
    """Train with HF Trainer on what the stages left in `workspace`; the loss of every step."""
    import torch
    from transformers import DataCollatorWithPadding, PrinterCallback, Trainer, TrainingArguments

    from stages.batches.plan import LOADERS, BatchPlan
    from stages.batches.tokenized import TOKENIZED, load_split, load_task, load_tokenizer
    from stages.config.pretrained import resolve_model
    from stages.config.read import load_params
    from stages.modeling.build import build_model
    from stages.modeling.head import head_of
    from stages.modeling.losses import loss_name
    from stages.training.optim import make_optimizer

    params, task = load_params(workspace / "params.yaml"), load_task(workspace / TOKENIZED)
    train, source = params.train, resolve_model(params.model.source, params.model.revision)
    model: Any = build_model(params.model, source, head_of(task, loss_name(train, task)), train.seed)
    # Trainer takes the **kwargs of BERT's forward for a promise to divide the loss by the rows of the whole step, which
    # it does not keep: without this line, accumulation over two micro-batches doubles loss and gradient.
    model.accepts_loss_kwargs = False
    tokenizer: Any = load_tokenizer(workspace / TOKENIZED)
    plan = BatchPlan(workspace / LOADERS)
    order = [row for step in plan.steps(1, steps) for micro_batch in step for row in micro_batch.rows]
    peer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(workspace / "trainer"),
            per_device_train_batch_size=BATCH_SIZE // accumulation,
            gradient_accumulation_steps=accumulation,
            train_sampling_strategy="sequential",
            max_steps=steps,
            learning_rate=train.learning_rate,
            warmup_steps=WARMUP_STEPS,
            weight_decay=train.weight_decay,
            max_grad_norm=train.max_grad_norm or 0.0,
            lr_scheduler_type=train.lr_scheduler_type,
            optim="adamw_torch_fused",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=load_split(workspace / TOKENIZED, "train").select(order),
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    peer.remove_callback(PrinterCallback)
    decayed = {
        id(parameter) for parameter in make_optimizer(model, train, torch.device("cpu")).param_groups[0]["params"]
    }
    ours = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    theirs = set(peer.get_decay_parameter_names(model))
    if ours != theirs:
        raise SystemExit(f"one of the two alone decays {', '.join(sorted(ours ^ theirs))}")
    peer.train()
    return [entry["loss"] for entry in peer.state.log_history if "loss" in entry]


def main() -> None:
    """Train both ways for every task and accumulation, and print how far apart the losses are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps, of one epoch at most")
    parser.add_argument("--tolerance", type=float, default=1e-5)
    parser.add_argument("--tasks", nargs="+", choices=LABELS, default=list(LABELS))
    arguments = parser.parse_args()
    if importlib.util.find_spec("accelerate") is None:
        raise SystemExit("HF Trainer needs accelerate: python -m pip install accelerate")
    sys.path.insert(0, str(ROOT))
    print("task            micro-batches  steps  max |difference|  at step  final loss  Trainer's", flush=True)
    within = True
    for task, accumulation in itertools.product(arguments.tasks, (1, 2)):
        with tempfile.TemporaryDirectory() as place:
            workspace = Path(place)
            prepare(workspace, task, accumulation, arguments.steps)
            ours, theirs = holdfast(workspace), trainer(workspace, accumulation, arguments.steps)
        if not len(ours) == len(theirs) == arguments.steps:
            raise SystemExit(f"{len(ours)} losses of Holdfast, {len(theirs)} of Trainer, {arguments.steps} steps")
        differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
        largest = max(differences)
        print(
            f"{task:14}  {accumulation:13}  {arguments.steps:5}  {largest:16.1e}  {differences.index(largest) + 1:7}"
            f"  {ours[-1]:10.6f}  {theirs[-1]:9.6f}",
            flush=True,
        )
        within = within and largest <= arguments.tolerance
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
