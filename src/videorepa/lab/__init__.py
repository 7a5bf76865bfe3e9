"""Physics with ground truth on a CPU: micro models, calibration of the law checks, and a study."""
