"""The study: arms trained, generated from and scored, and their tables."""
