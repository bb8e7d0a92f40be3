"""Prompts: where they come from, which of them are held out, and which of them make up a step."""
