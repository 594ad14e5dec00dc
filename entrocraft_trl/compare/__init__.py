"""
Methods side by side: the same task, start, budget and evaluation for any trainer with the constructor of TRL's.

An experiment (`experiment`) is a YAML file, read and checked whole before a model loads (`reading`). It means runs
(`jobs`), which worker processes train (`workers`, `run`); each leaves one record (`records`), of which figures
(`figures`), tables (`table`) and drawings (`drawing`) are made. Imports everything but the commands.
"""
