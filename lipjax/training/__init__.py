"""The trainer: data, train state, step, loop, checkpoints, evaluation."""
