"""What plugins do to the output: metrics as records, the core's own among them, and the check of a declared fidelity.

`core` registers the core's metrics; each is a file that draws its items from a seed, observes one side, and compares two. `statistics` has the
intervals. Nothing here knows how a side runs: that is `plugmesh.records.QualitySubject`, which `plugmesh.ab` implements.
"""
