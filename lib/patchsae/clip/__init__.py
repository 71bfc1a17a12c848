"""CLIP cut in two after a block: the hooks.

What is before the cut gives the residual stream of every token, what is after it answers from edited ones.
Model files, towers, zero-shot classification; another kind of vision transformer belongs here.
"""
