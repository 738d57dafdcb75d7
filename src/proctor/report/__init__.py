"""Tables and the live view."""
