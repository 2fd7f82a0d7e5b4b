"""What an episode is worth: r = lambda1 r_parallel + lambda2 r_finish + r_perf.

parl       the sum, its annealed weights, r_parallel and r_finish from the record
outcome    r_perf where the answer can be checked: items, exact, counting, budget control
vision     boxes, points, polygons, read text
judge      r_perf where it cannot: a model grades against rubrics
"""
