"""The fast form as Triton kernels. Importing this package does not import triton."""
