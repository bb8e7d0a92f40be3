"""Making pictures and measuring them: during training, and by `draftplus generate` and `draftplus evaluate`."""
