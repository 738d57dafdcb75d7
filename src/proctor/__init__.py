"""Proctor runs evaluations of large language models: it plans, serves, resumes and scores."""

__version__ = "0.1.0"
