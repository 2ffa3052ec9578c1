"""`calibrate`: which text, how much memory, what is written."""
