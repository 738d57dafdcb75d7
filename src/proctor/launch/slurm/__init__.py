"""Slurm: submit, watch, requeue and cancel. Reads columns, which old and new versions print alike, and no JSON."""
