"""plugmesh: serve language models as a mesh of small services, every optimization a plugin.

This package is the host: types, errors, plugin records and hook specs, configuration, the mesh
runtime, the command line, the client and the testing kit. It never imports torch.
"""

__version__ = "0.1.0"
