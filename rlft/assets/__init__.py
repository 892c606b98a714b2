"""Files that ship with rlft: `mini/`, the model of the quickstart.

`configs/arithmetic_mini.py` is the recipe that made it, and says with which command.
"""
