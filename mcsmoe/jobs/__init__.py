"""How the workflow starts its jobs: measured, and forked from a process that has the libraries loaded already."""
