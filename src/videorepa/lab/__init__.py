"""Physics with ground truth on a CPU: the micro models, their law checks, and the study."""
