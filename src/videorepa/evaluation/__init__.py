"""Turns scored clips into tables: statistics, paired comparisons and blind ratings."""
