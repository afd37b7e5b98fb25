"""What every room uses: errors, options, files, locks, signals. Imports no torch."""
