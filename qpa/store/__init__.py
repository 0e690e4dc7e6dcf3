"""Files on disk: whole or not at all, safetensors a tensor at a time, and the directory of a run."""
