"""What the service is about: settings, states, tables, queries, storage, planning. No torch, no web framework."""
