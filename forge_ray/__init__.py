"""Forge-Ray: a company's own language model, trained from scratch on its own documents and served privately."""

__version__ = "0.1.0"
