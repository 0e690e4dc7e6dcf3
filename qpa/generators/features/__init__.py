"""Features: what a decoder sees of a chunk, of circuits or of a control in their place."""
