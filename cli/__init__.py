"""What the command line says: flags, their meaning, their checks."""
