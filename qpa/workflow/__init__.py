"""A run from a configuration: all passes in their order, leaving out what is done and unchanged."""
