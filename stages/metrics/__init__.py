"""`evaluate` modules, one a task: `evaluate.load("stages/metrics/classification.py", "f1")`."""
