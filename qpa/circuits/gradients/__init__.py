"""How a gradient of the probabilities is pulled back to the angles, with one file for each estimator."""
