"""The laws of the simulated world, measured in a clip."""
