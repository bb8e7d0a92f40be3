"""What a run directory holds: its configuration, journals, adapters and checkpoints."""
