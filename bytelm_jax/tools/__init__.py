"""What looks at models, runs and machines."""
