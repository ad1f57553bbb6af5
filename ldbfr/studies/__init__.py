"""Experiments of several trainings or samplings that end in one report."""
