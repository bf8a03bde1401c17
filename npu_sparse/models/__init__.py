"""What meets transformers: model classes (architectures.py), its attention seam (attention.py, forward.py), and its caches.

Only architectures.py knows model classes, and only attention.py registers anything with transformers.
"""
