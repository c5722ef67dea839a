"""What tells one kind of task from another: a module a kind, and the registry that everybody asks."""
