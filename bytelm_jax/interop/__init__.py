"""Weights to files and back, including the formats of other projects."""
