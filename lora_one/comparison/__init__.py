"""A fair comparison of methods: each at its own learning rate, over seeds, with what that rate cost.

``settings.py`` reads what is asked for, ``search.py`` decides which rates are tried, ``runs.py`` knows the
runs, ``sweeper.py`` hands them to Hydra's launchers; ``results.py`` reads their records, ``analysis.py`` and
``statistics.py`` count, ``verdict.py``, ``report.py`` and ``figures.py`` say what came of it.
"""
