"""Child processes that cannot outlive us: every server, engine host and worker is started through here."""
