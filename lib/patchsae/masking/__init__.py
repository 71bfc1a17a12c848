"""What the model answers when latents are switched off or on.

Masked tokens, the rankings that say which latents first, and the sweep over how many.
Another ranking, way of masking or measure of the answers belongs here.
"""
