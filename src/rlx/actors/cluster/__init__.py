"""Machines that know each other: the cluster's key, connections that prove it, and who is let in."""
