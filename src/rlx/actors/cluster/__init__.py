"""Actors on many machines: one daemon and one port each, and a driver with one link to every daemon.

A link is a TCP connection behind TLS and a challenge; what travels on it are the frames of the local engine, those of
all actors of a node together. The daemon passes them on between the link and its processes, and unpickles nothing. A
connection that is lost is a node that is lost: its actors end, nothing is sent twice, and who comes back begins anew.
"""
