"""Shipped with rlx as rlx.configs."""
