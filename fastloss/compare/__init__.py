"""Losses compared by experiment: training with each, and a verdict that knows its uncertainty."""
