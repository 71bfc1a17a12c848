"""The book's own images: pictograms on drawn backgrounds, whose truth is known.

Drawings, concepts, the renderer and its captions, and the sets that the chapters use.
Another style, factor of a scene or data set of the embedded scale belongs here.
"""
