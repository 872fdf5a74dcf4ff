"""Tools that examine models, runs and machines."""
