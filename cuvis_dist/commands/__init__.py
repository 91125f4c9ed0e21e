"""What does each command do with what a person typed, and what does it print?"""
