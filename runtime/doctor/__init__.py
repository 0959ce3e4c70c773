"""`graft doctor`: every device operation checked and timed on this machine, the demo end to end, one report."""
