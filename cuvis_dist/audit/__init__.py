"""What stands out in an archive, or has changed since a pipeline was fitted? No cube is read."""
