"""The mesh runtime: carriers for one contract, discovery, subjects, work queues, service life cycle."""
