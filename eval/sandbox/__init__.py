"""Running programs that nobody has read: ``outside.py`` is what the others use.

``inside.py`` and ``kernel.py`` run in the contained process. They need the standard library only, so
that this package must import nothing here.
"""
