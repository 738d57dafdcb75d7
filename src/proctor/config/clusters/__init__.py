"""What is particular to a cluster: packaged and user profiles, which one this is, and what a job of a run becomes."""

from proctor.config.clusters.choice import Choice, choose, detect
from proctor.config.clusters.files import load_profiles, user_files
from proctor.config.clusters.profile import ClusterProfile
from proctor.config.clusters.settings import Override, SlurmSettings, resolve_launch

__all__ = [
    "Choice",
    "ClusterProfile",
    "Override",
    "SlurmSettings",
    "choose",
    "detect",
    "load_profiles",
    "resolve_launch",
    "user_files",
]
