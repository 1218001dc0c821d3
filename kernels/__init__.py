"""Triton kernels, one operator a file; imported as ``pyfastpeft.kernels``."""
