"""Shipped with rlx as rlx.envs."""
