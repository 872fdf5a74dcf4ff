"""The same functions, faster on one machine: code that depends on platform or dtype width."""
