"""What api/ and worker/ share: settings, database, jobs, storage, transfer. No torch, no web framework."""
