"""C with OpenMP and SIMD pragmas from a schedule tree, and the program that compares it with the original."""
