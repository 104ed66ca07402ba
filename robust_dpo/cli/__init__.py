"""The command `robust-dpo`. Importing it is cheap: torch and transformers load inside the commands that need them."""

from robust_dpo.cli.app import app, main

__all__ = ["app", "main"]
