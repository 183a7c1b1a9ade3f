"""One training loop for all tasks, and what it leaves behind: weights, curves and a model card."""
