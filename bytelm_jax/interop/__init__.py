"""Weights to files and back, and other people's formats."""
