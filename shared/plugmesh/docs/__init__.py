"""Pages that are rendered from the code, so that they cannot say anything else."""
