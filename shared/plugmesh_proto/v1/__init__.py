"""Version 1 of the wire contract; generated from protos/plugmesh_proto/v1 by scripts/generate_protos."""
