"""The simulator: scenes of moving bodies, rendered, with ground truth. It knows nothing of us."""
