"""One file per change, oldest first; Alembic follows their `down_revision`."""
