"""Host launchers, one module per operation, named like the kernels they launch."""
