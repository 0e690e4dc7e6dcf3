"""How a gradient of the probabilities is pulled back to the angles: an estimator a file."""
