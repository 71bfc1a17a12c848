"""Sparse autoencoders on every patch of CLIP: the engine behind the book."""

__version__ = "0.1.0"
