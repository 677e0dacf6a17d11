"""The kernels and the choice between them; private, see :mod:`snnkernels.functional`."""
