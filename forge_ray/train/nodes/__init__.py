"""Beneath Ray Train: agents on nodes, where they are placed, nodes that come and are taken away."""
