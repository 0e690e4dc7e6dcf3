"""The ONNX graph of a causal language model, which three formats share."""
