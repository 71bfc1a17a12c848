"""Images and their labels, from disk to uint8 tensors.

Image sets, their reading in advance, augmentation, few-shot draws, and the benchmarks in CoOp's layout.
Nothing here has heard of a model: another source of images belongs here.
"""
