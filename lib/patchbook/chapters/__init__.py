"""What a chapter computes beyond the engine, and what decides its verdicts.

The rows of Table 2, truth by construction, the goals of training, and numbers that the paper prints.
A notebook tells; whatever it would define belongs here.
"""
