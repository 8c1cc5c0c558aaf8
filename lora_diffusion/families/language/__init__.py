"""Models of transformers that write text: LLaVA and Whisper."""
