"""Load for a running server and what became of it: `graft bench`. Read `run.py` first."""
