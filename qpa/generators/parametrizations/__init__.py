"""Parametrizations: how an adapter's tensor comes of trained numbers of its own, without chunks."""
