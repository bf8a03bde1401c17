from .op import index_kl

__all__ = ["index_kl"]
