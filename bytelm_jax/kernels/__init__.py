"""The same function, faster on one machine: what depends on the platform or on a dtype's width."""
