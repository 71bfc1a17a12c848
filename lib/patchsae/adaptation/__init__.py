"""CLIP adapted by prompts, and what adaptation does to latents.

MaPLe, CoOp and visual prompts, LoRA and fine-tuning: their text, files and training; then which latents
are used otherwise. Another method, or another comparison of a model with its adapted one, belongs here.
"""
