"""Native kernels for language models on a CPU, and the packing of weights for them."""
