"""The database's revisions (Alembic)."""
