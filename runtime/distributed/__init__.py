"""Processes that work together: the mesh of their groups, and collectives with gradients."""
