"""From the records of many runs to tables, figures and pages.

``reading`` finds runs, ``rows`` compares whatever is there, ``papers`` fills a published table, ``curves``
and ``figures`` draw, ``formats`` and ``page`` write. Nothing here starts, changes or removes a run.
"""
