"""Documents out of stores, formats and archives that nobody vouches for."""
