"""The model catalogue and the bytes of the weights.

Reading order: `service` (the wire), `importing` (a file becomes a model), `gguf_file` and `gguf_model`,
`safetensors_file` and `hf_model` (what a file holds, checked before anything is allocated), `blobs` (content-addressed
bytes on disk), `catalogue` with `migrations` (what is visible), `pack` and `resolving` (a model in a wanted format).
"""
