"""What a run will take, by arithmetic. Imports no torch."""
