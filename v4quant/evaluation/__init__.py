"""`evaluate`: candidates against a reference, and the report."""
