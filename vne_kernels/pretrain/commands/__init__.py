"""The commands of ``vne-pretrain``, a module each, imported when it is called.

A command module has ``DESCRIPTION`` and ``EPILOG`` for its help, ``configure(parser)`` for its
options and ``start(given)``, which runs it with the options that were given and returns the exit
code. What a command does stands in the modules above this folder; heavy imports happen in
``start``, so that help and bad options answer at once and without the extra.
"""

DEFAULT = "train"

#: name -> what it does; its module has '_' for '-'
COMMANDS = {
    "train": "pretrain an encoder (what bare options do)",
    "recipes": "list the named protocols, or show one",
    "linear-eval": "the paper's linear probe on the encoder of a run",
    "knn": "k nearest neighbours on the encoder of a run",
    "export": "write the encoder for torchvision, timm or detectron2",
    "variance": "information estimates of three losses during training (Figures 2 and 4)",
    "batch-size": "accuracy against batch size, for losses, epochs and seeds (Figure 3, Table 1a)",
    "report": "write a run's report.html anew",
}
