"""Trains: the student, its state, its memory, and the processes that share the work."""
