"""What a run takes in memory, before any weight is loaded."""
