"""Safetensors files: headers that are not trusted, numbers without torch, loading, saving and rewriting."""
