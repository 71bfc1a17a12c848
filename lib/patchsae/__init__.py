"""Sparse autoencoders on every patch of CLIP: the library behind the book."""

__version__ = "0.1.0"
