"""Compares the two frameworks, tensor by tensor."""
