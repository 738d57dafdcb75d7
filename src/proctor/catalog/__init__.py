"""Names to tasks and models: what can be asked, and of whom."""
