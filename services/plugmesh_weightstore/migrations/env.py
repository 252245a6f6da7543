"""Run by Alembic with the connection that `plugmesh_weightstore.database.migrate` hands over; its transaction is the caller's."""

from alembic import context

from plugmesh_weightstore.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
