"""Optimizers by configuration, their schedule, and the Q-learning agent."""
