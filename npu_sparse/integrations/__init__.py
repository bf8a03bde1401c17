"""Sparse prefill inside other programs: each folder or file is the bridge to one of them and imports it only when used."""
