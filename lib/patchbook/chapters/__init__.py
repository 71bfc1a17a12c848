"""What a chapter computes beyond the engine, and what decides its verdicts.

`opening` is what every chapter begins with. Then by chapter: `training`, `rebuilt` (1); `statistics`,
`transfer`, `factors`, `truth`, `kept_truth`, `known` (2); `localization`, `mask_scores`, `layers`,
`reading`, `words` (3); `masking`, `masking_sets` (4); `adaptation` (5); `ablation`, `table2`, `seeds`,
`probes`, `against_untrained`, `learned`, `tuning` (6); `explored`, `vocabulary` (7). Rules are in
`verdicts_of_latents` (chapters 1 to 3, 6) and `verdicts_of_models` (4, 5), what others published in
`published`. A notebook tells and defines nothing.
"""
