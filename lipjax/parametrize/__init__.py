"""Parametrisations: raw arrays to the arrays of operators, one method per file. Bounds never look in here."""
