"""What runs circuits and gives the probabilities of their basis states."""
