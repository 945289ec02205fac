"""The database: tables, queries, the unit of work, and migrations."""
