"""What surrounds full attention in hybrid models, made fast: Gated DeltaNet layers, norms and the gated feed-forward."""

from .attach import FastHybrid

__all__ = ["FastHybrid"]
