"""``vne-pretrain``: self-supervised pretraining by the von Neumann difference of entropies.

The program behind the console script (also ``python -m vne_kernels.pretrain``). Modules, each with
one reason to change, dependencies pointing down only:

======================  ===========================================================================
``cli``, ``commands``   command line -> a command, a module each; exit codes
``run``                 one run from data to results
``sweep``               many runs, each in a process of its own
``batch_size``          accuracy against batch size: the table and picture of such a sweep
``variance``            information estimates during training: likewise
``report``, ``plots``   a run's HTML report and PNG plots, drawn from its files alone
``linear_eval``         the paper's linear probe; ``knn``, ``export``: what else is done with
``frozen``              the encoder of a run
``callbacks``           metrics tables, spectrum, online probes
``saving``              when a checkpoint is saved, and what is in it
``checkpoints``         their files: whole, verified, the newest good one; ``random_state``
``faults``              what ends a training; ``finite``: a loss that is not
``ranks``               the processes of one training
``disk``                writes that a full disk refuses; ``tensorboard``: its points among them
``evaluate``            features of a frozen encoder, scikit-learn's probes and nearest neighbours
``model``               encoder, optimiser, schedules
``objectives``          what ``--loss`` names: losses with their heads
``augment``             two random views of an image
``data``, ``classes``   the image sets and the loader that can resume anywhere; lists of classes
``precision``           decides 32-true or bf16-mixed by measuring
``environment``         versions, commit, device
``recipes``             the named protocols, a TOML file each
``paper``               the paper's own numbers
``config``              every option of a run with its default and its check; ``protocol``: of the
                        commands that use a run
``events``              what happened in a run
======================  ===========================================================================

From ``vne_kernels.common``: ``files``, atomic writes; ``stopping``, SIGTERM, SIGUSR1 and Ctrl-C;
``figures``, the looks of pictures.

Lightning does the loop, the devices and the resume, lightly the losses, heads and schedules,
torchvision the models and transforms, scikit-learn the probes. They come with the extra
``pip install 'vne_kernels[pretrain]'``; this package imports none of them until the program starts.
"""
