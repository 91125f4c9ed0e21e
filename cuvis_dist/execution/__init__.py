"""How does work reach workers, and how does it come back?"""
