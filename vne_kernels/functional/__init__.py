"""The public functions, by subject; `vne_kernels` exports them all."""
