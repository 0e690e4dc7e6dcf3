"""Generators: from the features of circuits to the tensors of an adapter."""
