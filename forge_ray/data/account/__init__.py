"""What became of every document: the ledger, its questions, and forgetting."""
