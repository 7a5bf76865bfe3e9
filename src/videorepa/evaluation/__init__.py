"""From scored clips to tables: statistics, paired comparisons, blind ratings."""
