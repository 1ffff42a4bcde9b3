"""What happens inside a training, measured while it runs and without changing it.

One file a family of measurements, each pure functions on tensors: ``updates.py`` (the step against full
fine-tuning's), ``subspaces.py`` (A and B against the gradient's singular spaces), ``spectra.py`` (sizes and
ranks), ``variances.py`` (scales of outputs and gradients), ``curvature.py`` (the Hessian's largest
eigenvalue). ``callback.py`` is called by the training, ``looks.py`` makes one look, ``layers.py`` and
``passes.py`` give it what it looks at, ``rows.py`` collects the figures, ``kept.py`` is what lies on disk,
``figures.py`` draws.
"""
