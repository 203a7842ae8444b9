"""The commands ``ptask`` and ``kubectl ptask``: tasks from a terminal. ``docs/cli.md`` shows them.

:mod:`ptask.app` says which commands there are, and imports what one does when it is run. Everything that is decided or drawn
is a pure function of manifests (:mod:`ptask.why`, :mod:`ptask.doctor`, :mod:`ptask.top`, :mod:`ptask.tables`);
:mod:`ptask.cluster` alone speaks to the Kubernetes API, over the client for services.
"""
