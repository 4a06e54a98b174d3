"""What is done to documents: each by itself, and compared with each other."""
