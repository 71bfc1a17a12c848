"""From images to a trained autoencoder.

Tokens of a backbone, cached or not, mixed into batches, and the trainer that is killed and goes on.
Another start, schedule or order of tokens belongs here.
"""
