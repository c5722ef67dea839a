"""Holdfast: five DVC stages around a resumable PyTorch training loop."""

import sys

# Packages that the interpreter brought along before any code of the project: its site, a debugger. No part of a run.
PRELOADED = frozenset(name.partition(".")[0] for name in sys.modules) - {"stages"}
