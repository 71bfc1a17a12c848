"""CLIP adapted by prompts, and what adaptation does to latents.

MaPLe, CoOp and visual prompts: their text, files and training; then which latents are used otherwise.
Another prompt method, or another comparison of a model with its adapted one, belongs here.
"""
