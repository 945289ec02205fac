"""Jobs: their kinds, checks, plans, estimates, limits, execution and progress."""
