"""What parameters of several sections must not say together."""

from __future__ import annotations

from stages.config.schema import FACTORY, LOSSES, METRICS, Params, is_custom
from stages.ground.errors import quote


def check(params: Params) -> None:
    """Raise ValueError with one line for the first contradiction."""
    for look in (_inputs, _loss, _metrics):
        look(params)


def _inputs(params: Params) -> None:
    source, features = params.model.source, params.data.feature_columns
    factory = source.startswith(FACTORY)
    if features and not factory:
        raise ValueError(
            f"data.feature_columns needs a model of your own, but model.source is {quote(source)}; "
            "write factory:module:callable, or name data.text_columns"
        )
    if features and params.tokenize.tokenizer:
        raise ValueError("tokenize.tokenizer is set, but data.feature_columns are numbers; write null")
    if features and params.build_loaders.bucketing == "length":
        raise ValueError("build_loaders.bucketing is length, but rows of feature_columns have none; write none")
    if factory and not features and not params.tokenize.tokenizer:
        raise ValueError(
            "tokenize.tokenizer is null, but a factory model brings no tokenizer; "
            "write a Hub id, a folder, or package:NAME/PATH that has one"
        )


def _loss(params: Params) -> None:
    task, train = params.data.task, params.train
    allowed = LOSSES[task]
    loss = train.loss or allowed[0]
    if loss not in allowed and not is_custom(loss):
        raise ValueError(
            f"train.loss is {quote(loss)}; for {task} it should be {', '.join(allowed)}, or module:callable"
        )
    if loss == "bce_with_logits" and task == "classification" and len(params.data.label_names or "ab") > 2:
        raise ValueError(
            "train.loss is bce_with_logits, but data.label_names has more than two classes; "
            "write cross_entropy, or data.task: multi_label if a row can have several"
        )
    for key in ("class_weights", "label_smoothing"):
        if getattr(train, key) and (task == "regression" or is_custom(loss)):
            off = "null" if key == "class_weights" else "0.0"
            raise ValueError(f"train.{key} is set, but the loss {quote(loss)} has none; write {off}")
    weights, names = train.class_weights, params.data.label_names
    if isinstance(weights, list) and names and len(weights) != len(names):
        raise ValueError(
            f"train.class_weights has {len(weights)} numbers for the {len(names)} classes in data.label_names"
        )


def _metrics(params: Params) -> None:
    known = METRICS[params.data.task]
    for name in params.evaluate.metrics:
        if name not in known and not is_custom(name):
            raise ValueError(
                f"evaluate.metrics names {quote(name)}, which nobody knows for {params.data.task}; "
                f"known are {', '.join(known)}, module:callable, and the folder of an evaluate module"
            )
    best = params.evaluate.metric_for_best_model
    if best not in (*params.evaluate.metrics, "loss") and not any(map(is_custom, params.evaluate.metrics)):
        raise ValueError(
            f"evaluate.metric_for_best_model is {quote(best)}, which is neither loss nor one of evaluate.metrics "
            f"({', '.join(params.evaluate.metrics)})"
        )
    if params.data.task == "regression" and params.evaluate.threshold != 0.5:
        raise ValueError("evaluate.threshold is set, but data.task regression decides nothing; write 0.5")
