"""What the suite can measure: every kind of case knows how to check itself, run, and write its record."""
