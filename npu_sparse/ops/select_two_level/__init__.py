from .op import select_two_level

__all__ = ["select_two_level"]
