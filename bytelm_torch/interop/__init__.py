"""Exports, and transformers' Auto classes."""
