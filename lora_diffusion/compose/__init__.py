"""Several adapters into one, adapters into checkpoints, and adapters out of checkpoints."""
