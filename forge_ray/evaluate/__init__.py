"""How good the model is on documents that it has not seen."""
