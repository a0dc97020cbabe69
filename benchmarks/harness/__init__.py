"""What every benchmark shares: options, providers and their training step, checks, fresh processes, what fits.

Also what a record says of machine and code.
"""
