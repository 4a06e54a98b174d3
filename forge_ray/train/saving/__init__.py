"""Checkpoints: what makes files one, writing in the background, pieces of several workers."""
