"""
What a person sees of a run: its log, plots, live curve, model card, memory estimate. Reads logs, never trainers.

Imports libraries, what lies below, and itself.
"""
