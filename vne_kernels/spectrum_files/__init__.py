"""``vne-spectrum``: the spectrum and the scores of embeddings in files larger than memory.

The program behind the console script (also ``python -m vne_kernels.spectrum_files``). Modules, each
with one reason to change, dependencies pointing down only:

============  =====================================================================================
``cli``       command line -> results; exit codes
``plot``      the picture
``scores``    what is computed from the spectrum: scores, the table, the printed lines
``work``      the pass over the rows, which can be interrupted and goes on where it was
``outputs``   names of what is written, and whether this program wrote it
``readers``   .npy, .npz, .safetensors and .parquet as streams of rows
============  =====================================================================================

Sums are those of `vne_kernels.DensityAccumulator`, scores those of `vne_kernels._core.spectra`.
Readers and pictures need ``pip install 'vne_kernels[spectrum]'``.
"""
