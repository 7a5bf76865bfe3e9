"""Measures features before and after alignment: closeness to teachers and readouts of contact."""
