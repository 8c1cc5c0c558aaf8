"""Noise schedules, timesteps, noise, prediction targets, loss functions and loss weights: rows of tables; no models.

Names in formulas: x0 clean latents, eps noise, alpha_bar the cumulated product of 1 - beta (Ho et al. 2020, arXiv
2006.11239, equation 4).
"""
