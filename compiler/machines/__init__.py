"""How long each family of machine takes for a piece of work: formulas over the figures of a data
sheet and a few coefficients (`trivium.compiler.calibration`), the same for one kernel of a model
and for the tables that `benchmarks/accuracy.py` scores them on.
"""
