"""A fair comparison of methods: each at its own learning rate, over seeds, with what that rate cost.

``search.py`` decides which rates are tried, ``settings.py`` reads what is asked for, ``sweeper.py`` hands the
runs to Hydra's launchers, ``results.py`` reads their records, ``statistics.py`` and ``report.py`` say what came of it.
"""
