"""Front ends of the scheduler: C text or Python calls in, a SCoP out.

    preprocess  macros and comments     regions      the region and its function     syntax   questions to the tree
    expressions what they read, affine  c            the walk over a region          builder  SCoPs and operators in Python
"""
