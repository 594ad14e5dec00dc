"""
Methods side by side: the same task, start, budget and evaluation for any trainer with the constructor of TRL's.

Imports everything but the commands.
"""
