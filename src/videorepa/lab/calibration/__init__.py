"""Sets the tolerances of the law checks and measures what the checks detect."""
