"""Your own models, losses, metrics and callbacks: what the parameters reach is part of a run's identity."""
