"""What is known about node classes, and about upstream's private names?"""
