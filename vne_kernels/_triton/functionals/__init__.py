"""One function of the spectrum a file, by the name of its operator.

Each file has a function ``functional(a, traces, method, *parameters, with_grad)``:

    a           [batch, m, m]: A^ = A / tau, of trace one but for rounding; 0 of an irregular sample
    traces      [batch] float64: tau, 0 or not finite of an irregular sample
    method      what was asked for: "auto", "eigh" or "poles"
    parameters  of the operator's own, between weights and normalize in its schema
    with_grad   whether the gradient is wanted

It returns the value [batch] and, with_grad, the `MatrixGradient` of stages.py, otherwise None.
"""
