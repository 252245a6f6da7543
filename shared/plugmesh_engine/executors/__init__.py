"""What runs the rows of a step: one module per device or library, imported only when it is used."""
