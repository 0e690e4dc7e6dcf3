"""Circuits: what they are, and what runs them."""
