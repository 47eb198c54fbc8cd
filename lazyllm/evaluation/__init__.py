"""Measuring what pruning gives and takes."""
