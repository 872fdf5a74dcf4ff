"""Building blocks shared by the architectures; import each from its own file."""
