"""What is learned without a GPU: ``python -m benchmarks.compiled`` compiles every launch and reads the machine code.

Beside it the traffic model, from which every modelled floor comes, and how launches fill a device.
"""
