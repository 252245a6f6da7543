"""Model graphs and the multiplications below them."""
