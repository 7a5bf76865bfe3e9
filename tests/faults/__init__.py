"""A campaign of faults, for as long as wanted: kills, bad inputs, and two processes on one folder.

`make test-faults` runs it; `__main__.py` says how it is driven.
"""
