"""`make demo`: one online D-Fusion run through the REST API, and what came out of it as a table and pictures."""
