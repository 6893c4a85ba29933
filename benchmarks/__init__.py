"""How fast the package is, and how much memory it takes, always beside what else computes the same thing.

How to add the benchmark of an op:

1. Write ``bench_<op>.py`` with one test, ``test_bench_<op>``. Its parameters are the sizes to measure, and the fixtures
   ``measured`` and ``device`` (``compiled_device`` for an op that needs the compiled extension), which ``conftest.py``
   explains.
2. In it, draw the inputs with a fixed seed, and write one function for each provider, which is one way to compute the
   op: its equation in plain PyTorch, which is usually the baseline, the package's own op, and other libraries.
3. Compute the expected answer once, in plain PyTorch. Give each provider, as its ``tolerance``, the relative error that
   its type allows; 0 asks for equal bits. No provider is timed before its answer was compared.
4. Say what every provider must at least read and write (``least_bytes``), and, where matrix products take most of the
   time, how many ``operations`` they have. Formulas that others may need belong into ``rada_fast/bench/costs.py``.
5. Hand all of it to the fixture: ``measured(Case(...))``. It times the providers in turn (``timing.py``), keeps a row
   of figures for each, and shows all rows in one table (``table.py``).

``bench_view_selection.py`` is the shortest example. ``make bench CASES="select"`` runs the benchmarks with that word in
their names. To have a new one measured on a GPU too, add a step to ``device/plan.py``.
"""
