"""Kinds of adapters: their tensors, how they sit on a model, and what they make of its weights."""
