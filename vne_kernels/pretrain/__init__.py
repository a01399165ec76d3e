"""``vne-pretrain``: self-supervised pretraining by the von Neumann difference of entropies.

The program behind the console script (also ``python -m vne_kernels.pretrain``). Modules, each with
one reason to change, dependencies pointing down only:

====================  ===========================================================================
``cli``               command line -> ``Config``; exit codes; starts or resumes a run
``run``               one run from data to results
``callbacks``         metrics tables, spectrum recorder, checkpoints and Ctrl-C
``evaluate``          linear probe and nearest neighbours on frozen features
``plots``             PNG plots, drawn from the tables alone
``model``             encoder, projector, loss, optimiser, schedules
``precision``         decides 32-true or bf16-mixed by measuring
``augment``           two random views of an image
``data``              the image sets and the loader that can resume anywhere
``config``            every option with its default and its check
``files``             atomic writes
====================  ===========================================================================

Lightning does the loop, the devices and the resume, lightly the augmentation, projection head and
schedule, scikit-learn the probes. They come with the extra ``pip install 'vne_kernels[pretrain]'``;
this package imports none of them until the program starts.
"""
