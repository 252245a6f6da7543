"""The history of the catalogue's tables, applied by `plugmesh_weightstore.database.migrate` at every start."""
