"""Sets the tolerances of the law checks and measures what they find."""
