from .op import attention_mass

__all__ = ["attention_mass"]
