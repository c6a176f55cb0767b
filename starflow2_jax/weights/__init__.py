"""Weights of others and of ours: name tables, safetensors in and out, model folders."""
