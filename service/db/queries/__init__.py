"""The SQL of the service. Functions take an open session and never commit."""
