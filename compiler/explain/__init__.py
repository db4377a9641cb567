"""Why a recipe loses accuracy, and what to do about it.

`run` is the whole; `diff` finds what a recipe changed, `instrument` makes models that can be asked
about it, `study` asks, `blame` concludes, `mix` and `budget` turn that into a recipe.
"""
