"""Training of models that do not fit one worker (FSDP2)."""
