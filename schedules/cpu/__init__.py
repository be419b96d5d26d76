"""Schedules for CPUs: convolutions of our own, and one pass for everything else."""
