"""The kinds of task by name: what `data.task` may be."""

from __future__ import annotations

from stages.tasks.base import Kind
from stages.tasks.classification import Classification
from stages.tasks.multi_label import MultiLabel
from stages.tasks.regression import Regression

KINDS: dict[str, Kind] = {kind.name: kind for kind in (Classification(), MultiLabel(), Regression())}
