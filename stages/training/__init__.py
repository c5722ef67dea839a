"""What a step does: the loop, callbacks, optimizers and schedules."""
