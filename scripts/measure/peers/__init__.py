"""Adapters of lora-diffusion beside those of a plain loop, on three styles and three concepts. Read `comparison` first.

python -m scripts.measure peers --seeds 0 1 2 --output runs/peers
"""
