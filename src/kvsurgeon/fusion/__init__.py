"""Attention as one operator: match attention sites, check the match numerically, and create the operator's inputs."""
