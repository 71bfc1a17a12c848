"""What every long computation stands on.

Result folders named by their inputs, processes that work together, progress bars, errors for the user.
Knows nothing of images, models or autoencoders: what would be as useful to another project belongs here.
"""
