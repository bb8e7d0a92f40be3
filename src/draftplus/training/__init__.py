"""Training: the loop, its steps, its state, and how that is spread over processes."""
