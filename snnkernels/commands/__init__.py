"""The commands of ``snnkernels``, one a module: ``add_parser(commands)`` and what it runs.

What runs takes the parsed arguments and returns a document for ``--json``; what it prints is for
people. Everything heavy is imported by the command that uses it, so ``info`` works with torch and
numpy alone.
"""
