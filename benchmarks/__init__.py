"""Measurements behind docs/results.md. Each module says what it measures and prints a table."""
