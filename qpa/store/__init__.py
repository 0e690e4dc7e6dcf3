"""Files that appear whole or not at all, safetensors files read a tensor at a time, and run directories."""
