"""Making pictures and measuring them, during training and for `draftplus generate` and `draftplus evaluate`."""
