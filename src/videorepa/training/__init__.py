"""One training: the student, its state, its memory, and the processes that share it."""
