"""Shipped data about devices and tasks, and the code that finds it."""
