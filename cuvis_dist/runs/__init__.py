"""How does one job go from what a person asked for to its result?"""
