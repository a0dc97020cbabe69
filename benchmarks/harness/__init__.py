"""What every benchmark shares: options, providers, their training step and its check, fresh processes, what fits."""
