"""The decoder: its arithmetic, its PyTorch form and its Hugging Face form."""
