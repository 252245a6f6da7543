"""How the services of a mesh reach each other.

    api          what a service sees: the seam
    runtime      the life of a service process
    real         the mesh over NATS and gRPC
    discovery, table   leases and the table of instances
    rpc          generated stubs and servicers over NATS and in process
    bus, workqueue     events and jobs
    broker       the embedded NATS server
    subjects     every subject, and the permissions
"""
