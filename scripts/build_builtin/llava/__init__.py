"""Rebuilds builtin/emoji-llava and datasets/emoji-questions."""
