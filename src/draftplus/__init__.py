"""draftplus: reward fine-tuning of text-to-image diffusion models that keeps their variety."""

__version__ = "0.1.0"
