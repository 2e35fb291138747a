"""Collecting experience: environments, runners that step them, groups of runners, and evaluation."""
