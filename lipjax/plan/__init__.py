"""What a training step needs of chips that are not here: memory, operations, traffic and time."""
