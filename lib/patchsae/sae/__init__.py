"""The sparse autoencoder.

`model` is the method on a page; `step` trains it, dense or by sparse kernels on CPU and GPU.
Files of other projects are read and written here too. Another activation, kernel or checkpoint format
belongs here.
"""
