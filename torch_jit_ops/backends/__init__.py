"""Where kernels run, and what compiles them."""
