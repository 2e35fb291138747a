"""Shipped with rlx as rlx.algorithms."""
