"""Private data and secrets in documents: the finders, and what is done about what they find."""
