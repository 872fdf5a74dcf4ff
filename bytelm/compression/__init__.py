"""Lossless compression of any bytes by a model of either framework: coder, file format, loop."""
