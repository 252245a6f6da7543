"""Run by Alembic with the connection that `plugmesh_grammar.database.migrate` hands over; its transaction is the caller's."""

from alembic import context

from plugmesh_grammar.database import VERSION_TABLE
from plugmesh_grammar.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    render_as_batch=True,
    transaction_per_migration=False,
)
with context.begin_transaction():
    context.run_migrations()
