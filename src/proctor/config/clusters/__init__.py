"""What is particular to a cluster: packaged and user profiles, which one this is, and what a job of a run becomes."""
