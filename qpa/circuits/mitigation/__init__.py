"""How counts of a device with errors become probabilities, with one file for each way."""
