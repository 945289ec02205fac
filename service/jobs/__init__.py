"""Jobs: what may be asked for, what it takes, how it is planned and executed."""
