"""Quantization: the grid, packing, round to nearest, LSQ, and the library backends."""
