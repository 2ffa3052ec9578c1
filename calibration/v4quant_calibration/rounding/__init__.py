"""Solvers of one matrix: codes and scales that cost least on its inputs."""
