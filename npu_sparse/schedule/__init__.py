"""A configurable polyhedral scheduler: C loop nests and operators in, a legal schedule and generated code out.

It needs the `schedule` extra (islpy, pycparser, highspy) and never torch.
"""
