"""What each latent stands for: the aggregation over an image set.

One pass gives the atlas, statistics and references of every latent; maps say where a latent fires.
Another statistic per latent, or another score of a map against an object, belongs here.
"""
