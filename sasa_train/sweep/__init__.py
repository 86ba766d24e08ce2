"""Many runs from one command: a grid, a list or a search, as many at a time as there are devices, and a ledger."""
