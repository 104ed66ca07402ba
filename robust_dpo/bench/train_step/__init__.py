"""Whole training steps side by side: our trainer, TRL's, and plain PyTorch loops, each in a process of its own."""
