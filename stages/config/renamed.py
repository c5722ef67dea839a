"""Names that users of Hugging Face's Trainer will type, and what to write here instead."""

from __future__ import annotations

# HF names that work differently here: what to write instead.
INSTEAD = {
    "per_device_train_batch_size": "build_loaders.batch_size (rows per optimizer step over all processes) "
    "and build_loaders.micro_batch_size (rows per forward pass)",
    "per_device_eval_batch_size": "evaluate.eval_batch_size",
    "gradient_accumulation_steps": "build_loaders.batch_size and build_loaders.micro_batch_size; "
    "accumulation is their quotient",
    "warmup_ratio": "train.warmup_steps with a share below 1",
    "fp16": "train.precision: fp16",
    "bf16": "train.precision: bf16",
    "evaluation_strategy": "train.eval_strategy",
    "group_by_length": "build_loaders.bucketing: length",
    "preprocessing_num_workers": "tokenize.num_proc",
    "dataloader_num_workers": "train.num_workers",
    "dataloader_drop_last": "build_loaders.drop_last",
    "label_smoothing_factor": "train.label_smoothing",
    "full_determinism": "train.deterministic",
    "save_total_limit": "train.keep_candidates (models); two checkpoints are always kept",
    "load_best_model_at_end": "nothing: select_best always picks by evaluate.metric_for_best_model",
    "resume_from_checkpoint": "nothing: a killed run continues by itself; train.init_from_run starts from another",
    "data_seed": "build_loaders.seed",
    "torch_compile": "train.compile",
    "report_to": "train.loggers",
    "metric": "evaluate.metrics",
    "max_seq_length": "tokenize.max_length",
    "lr": "train.learning_rate",
    "output_dir": "nothing: models are in models/, run state in runs/",
}
