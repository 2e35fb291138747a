"""Learners: they own parameters and optimizer, and are the only place that computes gradients."""
