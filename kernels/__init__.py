"""The Triton kernels, installed as ``fastdense.kernels``.

One file a kernel, beside the launch configurations that choose its tile sizes. Importing this package needs
neither Triton nor a GPU: import the module of the kernel that you want.
"""
