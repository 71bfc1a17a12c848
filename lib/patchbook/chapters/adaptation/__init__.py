"""Chapter 5: CLIP against MaPLe on every data set; what is counted, masked and mixed, and what follows.

`tasks` opens both models on all data sets and says who is right. `accuracy`, `groups`, `ranked`, `own_sae`
and `mixtures` hold the tables and findings of a section each.
"""
