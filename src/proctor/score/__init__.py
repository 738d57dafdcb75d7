"""Answers in, metrics out."""
