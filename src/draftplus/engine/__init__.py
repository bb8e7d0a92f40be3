"""The engine: what runs training, evaluation and generation."""
