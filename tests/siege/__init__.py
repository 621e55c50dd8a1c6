"""Input of every kind that trapline reads, damaged at random, by the hundred thousand.

`python -m siege` (see `make hostile`) runs a campaign and prints a table; the tests beside it run
a small one. An input has a kind and a number, and is the same whenever it is made.
"""
