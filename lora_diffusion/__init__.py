"""Train, compose, evaluate and convert LoRA adapters for Stable Diffusion, LLaVA and Whisper."""

__version__ = "0.1.0"
