"""Evaluation: generation, graders, and results."""
