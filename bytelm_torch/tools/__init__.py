"""Tools around the models: looking inside them."""
