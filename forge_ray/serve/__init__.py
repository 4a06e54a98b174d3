"""Serving an exported folder: Ray Serve for the endpoint, vLLM for the tokens."""
