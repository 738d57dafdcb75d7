"""Launchers: run commands somewhere. They know commands, not evaluations."""
