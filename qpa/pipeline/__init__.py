"""Passes: their protocol, and how they are composed and run."""
