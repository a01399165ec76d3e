"""The operators in Triton, for installs without nvcc: `stages.py` maps the folder.

Nothing here is imported before the first tensor comes that these kernels serve: see
`vne_kernels.backends`.
"""
