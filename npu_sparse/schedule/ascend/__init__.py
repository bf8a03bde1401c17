"""AscendC vector code from a schedule tree: loops, memory, instructions, events; and the headers of hand-written kernels."""
