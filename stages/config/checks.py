"""What parameters of several sections must not say together."""

from __future__ import annotations

from stages.config.schema import FACTORY, Params, is_custom
from stages.ground.errors import quote

# What of a pretrained model's config something else decides, so that nobody would look at the keyword.
DATA, PRECISION, MODEL = "the labels in the data and data.task", "train.precision", "model.source"
SETTLED = {
    **dict.fromkeys(("num_labels", "id2label", "label2id", "problem_type"), DATA),
    **dict.fromkeys(("dtype", "torch_dtype"), PRECISION),
    **dict.fromkeys(("model_type", "architectures", "quantization_config"), MODEL),
}


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
    for key in params.model.kwargs:
        if not factory and key in SETTLED:
            raise ValueError(f"model.kwargs: {key} comes from {SETTLED[key]}; leave it out")
    for key in ("tokenizer", "pad_token", "split_special_tokens"):
        if features and getattr(params.tokenize, key) is not None:
            raise ValueError(f"tokenize.{key} is set, but data.feature_columns are numbers; write null")
    if features and params.build_loaders.bucketing == "length":
        raise ValueError("build_loaders.bucketing is length, but rows of feature_columns have none; write none")
    if factory and not features and not params.tokenize.tokenizer:
        raise ValueError(
            "tokenize.tokenizer is null, but a factory model brings no tokenizer; "
            "write a Hub id, a folder, or package:NAME/PATH that has one"
        )


def _loss(params: Params) -> None:
    kind, train = params.data.kind, params.train
    allowed = kind.losses
    loss = train.loss or allowed[0]
    if loss not in allowed and ":" not in loss:
        raise ValueError(
            f"train.loss is {quote(loss)}; for {kind.name} it should be {', '.join(allowed)}, or module:callable"
        )
    if loss in kind.two_class_losses and len(params.data.label_names or "ab") > 2:
        raise ValueError(
            f"train.loss is {loss}, but data.label_names has more than two classes; "
            f"write {allowed[0]}, or data.task: multi_label if a row can have several"
        )
    for key in ("class_weights", "label_smoothing"):
        if getattr(train, key) and (not kind.has_classes or ":" in loss):
            off = "null" if key == "class_weights" else "0.0"
            raise ValueError(f"train.{key} is set, but the loss {quote(loss)} has none; write {off}")
    weights, names = train.class_weights, params.data.label_names
    if isinstance(weights, list) and names and len(weights) != len(names):
        raise ValueError(
            f"train.class_weights has {len(weights)} numbers for the {len(names)} classes in data.label_names"
        )


def _metrics(params: Params) -> None:
    kind = params.data.kind
    for name in params.evaluate.metrics:
        if name not in kind.metrics and not is_custom(name):
            raise ValueError(
                f"evaluate.metrics names {quote(name)}, which nobody knows for {kind.name}; "
                f"known are {', '.join(kind.metrics)}, module:callable, and the folder of an evaluate module"
            )
    best = params.evaluate.metric_for_best_model
    if best not in (*params.evaluate.metrics, "loss") and not any(map(is_custom, params.evaluate.metrics)):
        raise ValueError(
            f"evaluate.metric_for_best_model is {quote(best)}, which is neither loss nor one of evaluate.metrics "
            f"({', '.join(params.evaluate.metrics)})"
        )
    classes = len(params.data.label_names or ())
    if classes > 2 and not kind.several and params.evaluate.threshold != 0.5:
        raise ValueError(
            f"evaluate.threshold is {params.evaluate.threshold}, but of the {classes} classes in data.label_names the "
            "likeliest is predicted; write 0.5"
        )
    if not kind.has_classes and params.evaluate.threshold != 0.5:
        raise ValueError(f"evaluate.threshold is set, but data.task {kind.name} decides nothing; write 0.5")
