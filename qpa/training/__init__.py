"""Training: data, calibration, the optimizer that holds a generator, evaluation and checkpoints."""
