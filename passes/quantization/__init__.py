"""What the quantizing passes are made of: the arithmetic of a grid (`linear`), what is learnt of a
tensor from data (`observers`, `calibration`), where an engine wants Q/DQ (`placement`) and the
graph edits that put it there (`insertion`).
"""
