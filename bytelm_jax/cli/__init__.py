"""The `bytelm` command."""
