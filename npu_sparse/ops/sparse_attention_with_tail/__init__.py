from .op import sparse_attention_with_tail

__all__ = ["sparse_attention_with_tail"]
